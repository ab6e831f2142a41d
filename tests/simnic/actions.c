// SPDX-License-Identifier: GPL-2.0
/*
 * What rules do with frames: translated when a rule is made, carried out when a frame hits it.
 */
#include <linux/etherdevice.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tc_act/tc_csum.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <net/checksum.h>

#include "simnic.h"

/* The fields that the NIC can rewrite, by word of a header. */
static const struct {
	u8	htype;
	u8	offset;
	u32	bits;	/* as __be32 */
} simnic_fields[] = {
	{ FLOW_ACT_MANGLE_HDR_TYPE_ETH, 0, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_ETH, 4, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_ETH, 8, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP4, 0, 0x00ff0000 },	/* TOS */
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP4, 8, 0xff000000 },	/* TTL */
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP4, 12, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP4, 16, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP6, 0, 0x0ff00000 },	/* traffic class */
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP6, 4, 0x000000ff },	/* hop limit */
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP6, 8, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP6, 12, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP6, 16, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP6, 20, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP6, 24, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP6, 28, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP6, 32, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_IP6, 36, 0xffffffff },
	{ FLOW_ACT_MANGLE_HDR_TYPE_TCP, 0, 0xffffffff },	/* ports */
	{ FLOW_ACT_MANGLE_HDR_TYPE_UDP, 0, 0xffffffff },
};

#define SIMNIC_CSUM_FLAGS (TCA_CSUM_UPDATE_FLAG_IPV4HDR |	\
			   TCA_CSUM_UPDATE_FLAG_TCP |		\
			   TCA_CSUM_UPDATE_FLAG_UDP |		\
			   TCA_CSUM_UPDATE_FLAG_ICMP)

static bool simnic_is_ttl(u8 htype, u8 offset)
{
	return (htype == FLOW_ACT_MANGLE_HDR_TYPE_IP4 && offset == 8) ||
	       (htype == FLOW_ACT_MANGLE_HDR_TYPE_IP6 && offset == 4);
}

static int simnic_parse_mangle(struct simnic_port *port, struct simnic_rule *rule,
			       const struct flow_action_entry *entry, struct simnic_act *act,
			       struct netlink_ext_ack *extack)
{
	enum simnic_feature feature = SIMNIC_F_ACT_MANGLE;
	u32 bits = 0;
	int i;

	for (i = 0; i < ARRAY_SIZE(simnic_fields); i++) {
		if (simnic_fields[i].htype == entry->mangle.htype &&
		    simnic_fields[i].offset == entry->mangle.offset)
			bits = (__force u32)cpu_to_be32(simnic_fields[i].bits);
	}
	if (~entry->mangle.mask & ~bits) {
		NL_SET_ERR_MSG_MOD(extack, "rewriting this header field (pedit) is not supported");
		return -EOPNOTSUPP;
	}

	act->id = SIMNIC_ACT_MANGLE;
	act->mangle.htype = entry->mangle.htype;
	act->mangle.offset = entry->mangle.offset;
	act->mangle.mask = entry->mangle.mask;
	act->mangle.val = entry->mangle.val;

	if (simnic_is_ttl(act->mangle.htype, act->mangle.offset)) {
		feature = SIMNIC_F_ACT_TTL;
		rule->edits_ttl = true;
	} else if (entry->id == FLOW_ACTION_ADD) {
		NL_SET_ERR_MSG_MOD(extack, "adding (pedit add) to anything but the TTL is not supported");
		return -EOPNOTSUPP;
	}
	if (entry->id == FLOW_ACTION_ADD)
		act->id = SIMNIC_ACT_ADD;
	if (!simnic_supports(port, feature, extack))
		return -EOPNOTSUPP;

	switch (act->mangle.htype) {
	case FLOW_ACT_MANGLE_HDR_TYPE_IP4:
		rule->need_version = 4;
		rule->edits_addrs |= act->mangle.offset >= offsetof(struct iphdr, saddr);
		break;
	case FLOW_ACT_MANGLE_HDR_TYPE_IP6:
		rule->need_version = 6;
		rule->edits_addrs |= act->mangle.offset >= offsetof(struct ipv6hdr, saddr);
		break;
	case FLOW_ACT_MANGLE_HDR_TYPE_TCP:
		rule->need_proto = IPPROTO_TCP;
		break;
	case FLOW_ACT_MANGLE_HDR_TYPE_UDP:
		rule->need_proto = IPPROTO_UDP;
		break;
	}
	return 0;
}

static int simnic_parse_vlan(struct simnic_port *port, const struct flow_action_entry *entry,
			     struct simnic_act *act, struct netlink_ext_ack *extack)
{
	if (!simnic_supports(port, SIMNIC_F_ACT_VLAN, extack))
		return -EOPNOTSUPP;
	switch (entry->id) {
	case FLOW_ACTION_VLAN_PUSH:
		act->id = SIMNIC_ACT_VLAN_PUSH;
		break;
	case FLOW_ACTION_VLAN_MANGLE:
		act->id = SIMNIC_ACT_VLAN_MODIFY;
		break;
	default:
		act->id = SIMNIC_ACT_VLAN_POP;
		return 0;
	}
	act->vlan.tpid = entry->vlan.proto;
	act->vlan.vid = entry->vlan.vid;
	act->vlan.prio = entry->vlan.prio;
	return 0;
}

static int simnic_parse_csum(struct simnic_port *port, u32 flags, struct simnic_act *act,
			     struct netlink_ext_ack *extack)
{
	if (!simnic_supports(port, SIMNIC_F_ACT_CSUM, extack))
		return -EOPNOTSUPP;
	if (flags & ~SIMNIC_CSUM_FLAGS) {
		NL_SET_ERR_MSG_MOD(extack, "checksums other than of IPv4, TCP, UDP and ICMP (csum) are not supported");
		return -EOPNOTSUPP;
	}
	act->id = SIMNIC_ACT_CSUM;
	act->csum_flags = flags;
	return 0;
}

static int simnic_parse_redirect(struct simnic_port *port, const struct flow_action_entry *entry,
				 struct simnic_act *act, struct netlink_ext_ack *extack)
{
	struct simnic_port *target = entry->dev ? simnic_port_of(entry->dev) : NULL;

	if (!simnic_supports(port, SIMNIC_F_ACT_REDIRECT, extack))
		return -EOPNOTSUPP;
	if (!target || target->dev != entry->dev) {
		NL_SET_ERR_MSG_MOD(extack, "redirecting (mirred) to a netdev that is no port of this NIC");
		return -EOPNOTSUPP;
	}
	act->id = SIMNIC_ACT_REDIRECT;
	act->egress = simnic_egress_get(target);
	return 0;
}

/* A rule's last action. */
static int simnic_parse_last(struct simnic_port *port, struct flow_cls_offload *f,
			     const struct flow_action_entry *entry, struct simnic_act *act)
{
	struct netlink_ext_ack *extack = f->common.extack;
	enum simnic_feature feature;

	switch (entry->id) {
	case FLOW_ACTION_REDIRECT:
		return simnic_parse_redirect(port, entry, act, extack);
	case FLOW_ACTION_GOTO:
		feature = SIMNIC_F_ACT_GOTO;
		act->id = SIMNIC_ACT_GOTO;
		act->chain = entry->chain_index;
		if (act->chain <= f->common.chain_index) {
			NL_SET_ERR_MSG_MOD(extack, "going back to a chain (goto) that is not a later one is not supported");
			return -EOPNOTSUPP;
		}
		break;
	case FLOW_ACTION_DROP:
		feature = SIMNIC_F_ACT_DROP;
		act->id = SIMNIC_ACT_DROP;
		break;
	case FLOW_ACTION_TRAP:
		feature = SIMNIC_F_ACT_TRAP;
		act->id = SIMNIC_ACT_TRAP;
		break;
	default:
		feature = SIMNIC_F_ACT_PASS;
		act->id = SIMNIC_ACT_PASS;
		break;
	}
	return simnic_supports(port, feature, extack) ? 0 : -EOPNOTSUPP;
}

static bool simnic_may_rewrite(enum simnic_act_id last)
{
	return last == SIMNIC_ACT_REDIRECT || last == SIMNIC_ACT_DROP;
}

/* What the flowtable leaves unsaid: the TTL is decremented, and checksums are kept right. */
static void simnic_add_implicit(struct simnic_rule *rule, u8 ip_version)
{
	struct simnic_act *ttl = &rule->acts[rule->n_acts++];
	struct simnic_act *csum = &rule->acts[rule->n_acts++];

	ttl->id = SIMNIC_ACT_ADD;
	if (ip_version == 4) {
		ttl->mangle.htype = FLOW_ACT_MANGLE_HDR_TYPE_IP4;
		ttl->mangle.offset = 8;
		ttl->mangle.val = (__force u32)cpu_to_be32(0xff000000);
	} else {
		ttl->mangle.htype = FLOW_ACT_MANGLE_HDR_TYPE_IP6;
		ttl->mangle.offset = 4;
		ttl->mangle.val = (__force u32)cpu_to_be32(0x000000ff);
	}
	ttl->mangle.mask = ~ttl->mangle.val;
	rule->edits_ttl = true;
	rule->need_version = ip_version;

	csum->id = SIMNIC_ACT_CSUM;
	csum->csum_flags = SIMNIC_CSUM_FLAGS;
}

static int simnic_parse_act(struct simnic_port *port, bool ft, struct flow_cls_offload *f,
			    const struct flow_action_entry *entry, struct simnic_rule *rule)
{
	struct netlink_ext_ack *extack = f->common.extack;
	struct simnic_act *act = &rule->acts[rule->n_acts];
	int err;

	switch (entry->id) {
	case FLOW_ACTION_MANGLE:
	case FLOW_ACTION_ADD:
		err = simnic_parse_mangle(port, rule, entry, act, extack);
		break;
	case FLOW_ACTION_CSUM:
		if (ft)
			return 0;
		err = simnic_parse_csum(port, entry->csum_flags, act, extack);
		break;
	case FLOW_ACTION_VLAN_PUSH:
	case FLOW_ACTION_VLAN_POP:
	case FLOW_ACTION_VLAN_MANGLE:
		err = simnic_parse_vlan(port, entry, act, extack);
		break;
	case FLOW_ACTION_REDIRECT:
	case FLOW_ACTION_GOTO:
	case FLOW_ACTION_DROP:
	case FLOW_ACTION_TRAP:
	case FLOW_ACTION_ACCEPT:
		err = simnic_parse_last(port, f, entry, act);
		if (!err && rule->n_acts && !simnic_may_rewrite(act->id)) {
			NL_SET_ERR_MSG_MOD(extack, "rewriting before anything but redirect and drop is not supported");
			err = -EOPNOTSUPP;
		}
		break;
	case FLOW_ACTION_MIRRED:
	case FLOW_ACTION_MIRRED_INGRESS:
	case FLOW_ACTION_REDIRECT_INGRESS:
		NL_SET_ERR_MSG_MOD(extack, "mirroring and redirecting to ingress (mirred) are not supported");
		return -EOPNOTSUPP;
	case FLOW_ACTION_POLICE:
		NL_SET_ERR_MSG_MOD(extack, "policing (police) is not supported");
		return -EOPNOTSUPP;
	case FLOW_ACTION_CT:
		NL_SET_ERR_MSG_MOD(extack, "conntrack (ct) is not supported");
		return -EOPNOTSUPP;
	case FLOW_ACTION_TUNNEL_ENCAP:
	case FLOW_ACTION_TUNNEL_DECAP:
		NL_SET_ERR_MSG_MOD(extack, "tunnels (tunnel_key) are not supported");
		return -EOPNOTSUPP;
	default:
		NL_SET_ERR_MSG_MOD(extack, "this action is not supported");
		return -EOPNOTSUPP;
	}
	if (!err)
		rule->n_acts++;
	return err;
}

static int simnic_check_hw_stats(struct simnic_port *port, struct simnic_rule *rule,
				 const struct flow_action *action, struct netlink_ext_ack *extack)
{
	if (!flow_action_mixed_hw_stats_check(action, extack))
		return -EOPNOTSUPP;
	/* Counters are read when asked for; with knob "stats_interval_ms" only now and then. */
	rule->hw_stats = port->knobs.stats_interval_ms ? FLOW_ACTION_HW_STATS_DELAYED
						       : FLOW_ACTION_HW_STATS_IMMEDIATE;
	if (action->entries[0].hw_stats & rule->hw_stats)
		return 0;
	if (!port->knobs.stats_interval_ms &&
	    action->entries[0].hw_stats & FLOW_ACTION_HW_STATS_DELAYED) {
		rule->hw_stats = FLOW_ACTION_HW_STATS_DELAYED;
		return 0;
	}
	NL_SET_ERR_MSG_MOD(extack, "this type of statistics (hw_stats) is not supported");
	return -EOPNOTSUPP;
}

/**
 * simnic_actions_parse() - makes a rule of what the kernel asks to do
 * @port: the port that the rule is for
 * @ft: whether it is the flowtable's
 * @f: what the kernel asks
 *
 * Return: a rule without key, or an error with a reason in @f's extack.
 */
struct simnic_rule *simnic_actions_parse(struct simnic_port *port, bool ft,
					 struct flow_cls_offload *f)
{
	const struct flow_action *action = &flow_cls_offload_flow_rule(f)->action;
	struct netlink_ext_ack *extack = f->common.extack;
	const struct flow_action_entry *entry;
	struct flow_match_basic basic;
	struct simnic_rule *rule;
	int i, err;

	if (!flow_action_has_entries(action)) {
		NL_SET_ERR_MSG_MOD(extack, "a rule needs actions");
		return ERR_PTR(-EOPNOTSUPP);
	}
	rule = simnic_rule_alloc(action->num_entries + 2);
	if (!rule)
		return ERR_PTR(-ENOMEM);

	if (ft) {
		/* The flowtable does not say how it wants its counters: it asks now and then. */
		rule->hw_stats = FLOW_ACTION_HW_STATS_DELAYED;
	} else {
		err = simnic_check_hw_stats(port, rule, action, extack);
		if (err)
			goto err_rule;
	}

	flow_action_for_each(i, entry, action) {
		if (rule->n_acts && rule->acts[rule->n_acts - 1].id >= SIMNIC_ACT_REDIRECT) {
			NL_SET_ERR_MSG_MOD(extack, "actions after redirect, goto, drop, trap or pass are not supported");
			err = -EOPNOTSUPP;
			goto err_rule;
		}
		if (ft && entry->id == FLOW_ACTION_REDIRECT) {
			flow_rule_match_basic(f->rule, &basic);
			simnic_add_implicit(rule, basic.key->n_proto == htons(ETH_P_IP) ? 4 : 6);
		}
		err = simnic_parse_act(port, ft, f, entry, rule);
		if (err)
			goto err_rule;
	}
	if (!rule->n_acts || rule->acts[rule->n_acts - 1].id < SIMNIC_ACT_REDIRECT) {
		NL_SET_ERR_MSG_MOD(extack, "a rule must end with redirect, goto, drop, trap or pass");
		err = -EOPNOTSUPP;
		goto err_rule;
	}
	return rule;

err_rule:
	simnic_rule_free(rule);
	return ERR_PTR(err);
}

/* What checksums cover of what can be rewritten, as it was. */
struct simnic_snapshot {
	u8	ip[sizeof(struct iphdr)];
	__be32	addrs[8];
	__be32	ports;
};

static unsigned int simnic_addrs(const struct simnic_frame *frame, const void **addrs)
{
	const u8 *ip = frame->skb->data + frame->l3;

	if (frame->key.ip_version == 4) {
		*addrs = ip + offsetof(struct iphdr, saddr);
		return 8;
	}
	*addrs = ip + offsetof(struct ipv6hdr, saddr);
	return 32;
}

static void simnic_snapshot_take(struct simnic_snapshot *snapshot,
				 const struct simnic_frame *frame)
{
	const void *addrs;
	unsigned int len;

	if (!frame->key.ip_version)
		return;
	memcpy(snapshot->ip, frame->skb->data + frame->l3, sizeof(snapshot->ip));
	len = simnic_addrs(frame, &addrs);
	memcpy(snapshot->addrs, addrs, len);
	if (simnic_frame_is_tcp_or_udp(frame))
		memcpy(&snapshot->ports, frame->skb->data + frame->l4, sizeof(snapshot->ports));
}

static void simnic_csum_replace(__sum16 *check, const void *from, const void *to, int len)
{
	__wsum sum = csum_sub(~csum_unfold(*check), csum_partial(from, len, 0));

	*check = csum_fold(csum_add(sum, csum_partial(to, len, 0)));
}

/* Updates the checksums by the difference to the snapshot. */
static void simnic_csum(const struct simnic_frame *frame, u32 flags,
			struct simnic_snapshot *snapshot)
{
	u8 *l4 = frame->skb->data + frame->l4;
	struct iphdr *iph;
	const void *addrs;
	unsigned int len;
	__sum16 *check;

	if (!frame->key.ip_version)
		return;
	if (frame->key.ip_version == 4 && flags & TCA_CSUM_UPDATE_FLAG_IPV4HDR) {
		iph = (struct iphdr *)(frame->skb->data + frame->l3);
		simnic_csum_replace(&iph->check, snapshot->ip, iph, sizeof(*iph));
	}
	if (!frame->l4)
		goto out;

	if (frame->key.ip_proto == IPPROTO_TCP && flags & TCA_CSUM_UPDATE_FLAG_TCP) {
		check = &((struct tcphdr *)l4)->check;
	} else if (frame->key.ip_proto == IPPROTO_UDP && flags & TCA_CSUM_UPDATE_FLAG_UDP) {
		check = &((struct udphdr *)l4)->check;
		if (!*check)
			goto out;
	} else {
		goto out;
	}
	len = simnic_addrs(frame, &addrs);
	simnic_csum_replace(check, snapshot->addrs, addrs, len);
	simnic_csum_replace(check, &snapshot->ports, l4, sizeof(snapshot->ports));
	if (frame->key.ip_proto == IPPROTO_UDP && !*check)
		*check = CSUM_MANGLED_0;
out:
	simnic_snapshot_take(snapshot, frame);
}

static void simnic_mangle(const struct simnic_frame *frame, const struct simnic_act *act)
{
	u8 *at = frame->skb->data + act->mangle.offset;
	u32 old, new;

	switch (act->mangle.htype) {
	case FLOW_ACT_MANGLE_HDR_TYPE_IP4:
	case FLOW_ACT_MANGLE_HDR_TYPE_IP6:
		at += frame->l3;
		break;
	case FLOW_ACT_MANGLE_HDR_TYPE_TCP:
	case FLOW_ACT_MANGLE_HDR_TYPE_UDP:
		at += frame->l4;
		break;
	}
	old = get_unaligned((u32 *)at);
	new = act->id == SIMNIC_ACT_ADD ? old + act->mangle.val : act->mangle.val;
	put_unaligned((old & act->mangle.mask) | (new & ~act->mangle.mask), (u32 *)at);
}

static int simnic_vlan_push(struct simnic_frame *frame, const struct simnic_act *act)
{
	u16 tci = act->vlan.vid | act->vlan.prio << VLAN_PRIO_SHIFT;
	int err;

	err = __vlan_insert_tag(frame->skb, act->vlan.tpid, tci);
	if (err)
		return err;
	frame->l3 += VLAN_HLEN;
	if (frame->l4)
		frame->l4 += VLAN_HLEN;
	frame->key.n_tags++;
	return 0;
}

static void simnic_vlan_pop(struct simnic_frame *frame)
{
	struct sk_buff *skb = frame->skb;

	if (!frame->key.n_tags)
		return;
	memmove(skb->data + VLAN_HLEN, skb->data, 2 * ETH_ALEN);
	skb_pull(skb, VLAN_HLEN);
	frame->l3 -= VLAN_HLEN;
	if (frame->l4)
		frame->l4 -= VLAN_HLEN;
	frame->key.n_tags--;
}

static void simnic_vlan_modify(struct simnic_frame *frame, const struct simnic_act *act)
{
	struct vlan_ethhdr *veth = (struct vlan_ethhdr *)frame->skb->data;
	u16 tci;

	if (!frame->key.n_tags)
		return;
	tci = ntohs(veth->h_vlan_TCI);
	tci = (tci & ~VLAN_VID_MASK) | act->vlan.vid;
	if (act->vlan.prio)
		tci = (tci & ~VLAN_PRIO_MASK) | act->vlan.prio << VLAN_PRIO_SHIFT;
	veth->h_vlan_TCI = htons(tci);
	veth->h_vlan_proto = act->vlan.tpid;
}

static int simnic_rewrite(struct simnic_frame *frame, const struct simnic_rule *rule)
{
	struct simnic_snapshot snapshot;
	unsigned int headers;
	int i, err;

	/* All that can be rewritten: two tags, an IPv6 header or an IPv4 header with options, TCP. */
	headers = frame->l4 ? frame->l4 + sizeof(struct tcphdr)
			    : frame->l3 + sizeof(struct ipv6hdr);
	err = skb_ensure_writable(frame->skb, min(headers, frame->skb->len));
	if (err)
		return err;

	simnic_snapshot_take(&snapshot, frame);
	for (i = 0; i < rule->n_acts; i++) {
		const struct simnic_act *act = &rule->acts[i];

		switch (act->id) {
		case SIMNIC_ACT_MANGLE:
		case SIMNIC_ACT_ADD:
			simnic_mangle(frame, act);
			break;
		case SIMNIC_ACT_CSUM:
			simnic_csum(frame, act->csum_flags, &snapshot);
			break;
		case SIMNIC_ACT_VLAN_PUSH:
			err = simnic_vlan_push(frame, act);
			if (err)
				return err;
			break;
		case SIMNIC_ACT_VLAN_POP:
			simnic_vlan_pop(frame);
			break;
		case SIMNIC_ACT_VLAN_MODIFY:
			simnic_vlan_modify(frame, act);
			break;
		default:
			break;
		}
	}
	return 0;
}

/* The TTL is one byte of the word that is rewritten. */
static bool simnic_ttl_survives(const struct simnic_frame *frame, const struct simnic_rule *rule)
{
	u8 ttl = frame->key.ttl;
	int i;

	for (i = 0; i < rule->n_acts; i++) {
		const struct simnic_act *act = &rule->acts[i];
		u32 val;

		if (act->id > SIMNIC_ACT_ADD ||
		    !simnic_is_ttl(act->mangle.htype, act->mangle.offset))
			continue;
		val = be32_to_cpu((__force __be32)act->mangle.val);
		if (act->mangle.htype == FLOW_ACT_MANGLE_HDR_TYPE_IP4)
			val >>= 24;
		ttl = act->id == SIMNIC_ACT_ADD ? ttl + (u8)val : (u8)val;
	}
	return frame->key.ttl && ttl;
}

/* Whether the rule can do with the frame what it should; if not, the host has to. */
static bool simnic_can_act(const struct simnic_frame *frame, const struct simnic_rule *rule)
{
	const struct simnic_act *last = &rule->acts[rule->n_acts - 1];
	const struct simnic_port *target;

	if (rule->need_version && rule->need_version != frame->key.ip_version)
		return false;
	if (rule->need_proto && (!frame->l4 || rule->need_proto != frame->key.ip_proto))
		return false;
	if (rule->edits_addrs && frame->key.ip_flags & SIMNIC_IP_FRAGMENT)
		return false;
	if (rule->edits_ttl && !simnic_ttl_survives(frame, rule))
		return false;
	if (last->id == SIMNIC_ACT_REDIRECT) {
		target = rcu_dereference(last->egress->port);
		if (target && frame->skb->len - frame->l3 > READ_ONCE(target->dev->mtu))
			return false;
	}
	return true;
}

static void simnic_redirect(struct simnic_port *port, const struct simnic_act *act,
			    struct sk_buff *skb)
{
	struct simnic_port *target = rcu_dereference(act->egress->port);

	if (target && simnic_port_send(target, skb)) {
		simnic_count(port, redirected);
		return;
	}
	if (!target)
		kfree_skb(skb);
	simnic_count(port, target_gone);
}

/**
 * simnic_pipeline() - takes a frame through the flow tables
 * @port: where it came from the wire
 * @skb: the frame, from its destination MAC on; gone unless it is the host's
 *
 * Context: RCU read side, softirqs disabled.
 * Return: whether the frame is the host's or was dealt with.
 */
enum simnic_verdict simnic_pipeline(struct simnic_port *port, struct sk_buff *skb)
{
	const struct simnic_table *table = &port->tc;
	const struct simnic_act *last;
	struct simnic_frame frame;
	struct simnic_rule *rule;
	u32 chain = 0;

	simnic_frame_parse(&frame, skb);
	for (;;) {
		rule = simnic_table_lookup(table, chain, &frame.key);
		if (!rule && !chain) {
			table = &port->ft;
			rule = simnic_table_lookup(table, chain, &frame.key);
		}
		if (!rule) {
			simnic_count(port, misses);
			return SIMNIC_TO_HOST;
		}
		if (!simnic_can_act(&frame, rule)) {
			simnic_count(port, exceptions);
			return SIMNIC_TO_HOST;
		}

		atomic64_inc(&rule->packets);
		atomic64_add(skb->len, &rule->bytes);
		WRITE_ONCE(rule->lastused, jiffies);

		last = &rule->acts[rule->n_acts - 1];
		if (last->id != SIMNIC_ACT_GOTO || rule->discard)
			break;
		chain = last->chain;
	}

	simnic_count(port, hits);
	if (rule->discard) {
		kfree_skb(skb);
		return SIMNIC_CONSUMED;
	}
	switch (last->id) {
	case SIMNIC_ACT_REDIRECT:
		if (simnic_rewrite(&frame, rule))
			kfree_skb(skb);
		else
			simnic_redirect(port, last, skb);
		return SIMNIC_CONSUMED;
	case SIMNIC_ACT_DROP:
		simnic_count(port, dropped);
		kfree_skb(skb);
		return SIMNIC_CONSUMED;
	default:
		simnic_count(port, trapped);
		return SIMNIC_TO_HOST;
	}
}
