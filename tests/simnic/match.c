// SPDX-License-Identifier: GPL-2.0
/*
 * Translates what the kernel asks to match on. What the NIC cannot match on is refused by name.
 */
#include <linux/tcp.h>

#include "compat.h"
#include "simnic.h"

static const struct {
	unsigned int	key;
	const char	*text;
} simnic_refused_keys[] = {
	{ FLOW_DISSECTOR_KEY_PORTS_RANGE, "simnic: match on port ranges (src_port, dst_port MIN-MAX) is not supported" },
	{ FLOW_DISSECTOR_KEY_ICMP, "simnic: match on ICMP (type, code) is not supported" },
	{ FLOW_DISSECTOR_KEY_ARP, "simnic: match on ARP (arp_...) is not supported" },
	{ FLOW_DISSECTOR_KEY_MPLS, "simnic: match on MPLS (mpls_...) is not supported" },
	{ FLOW_DISSECTOR_KEY_FLOW_LABEL, "simnic: match on the IPv6 flow label is not supported" },
	{ FLOW_DISSECTOR_KEY_ENC_KEYID, "simnic: match on a tunnel key (enc_key_id) is not supported" },
	{ FLOW_DISSECTOR_KEY_ENC_IPV4_ADDRS, "simnic: match on tunnel addresses (enc_src_ip, enc_dst_ip) is not supported" },
	{ FLOW_DISSECTOR_KEY_ENC_IPV6_ADDRS, "simnic: match on tunnel addresses (enc_src_ip, enc_dst_ip) is not supported" },
	{ FLOW_DISSECTOR_KEY_ENC_CONTROL, "simnic: match on tunnel flags (enc_flags) is not supported" },
	{ FLOW_DISSECTOR_KEY_ENC_PORTS, "simnic: match on tunnel ports (enc_dst_port) is not supported" },
	{ FLOW_DISSECTOR_KEY_ENC_IP, "simnic: match on a tunnel's TOS and TTL (enc_tos, enc_ttl) is not supported" },
	{ FLOW_DISSECTOR_KEY_ENC_OPTS, "simnic: match on tunnel options (geneve_opts, ...) is not supported" },
	{ FLOW_DISSECTOR_KEY_CT, "simnic: match on conntrack (ct_state, ct_zone, ct_mark, ct_label) is not supported" },
	{ FLOW_DISSECTOR_KEY_HASH, "simnic: match on the hash (hash) is not supported" },
	{ FLOW_DISSECTOR_KEY_NUM_OF_VLANS, "simnic: match on the number of VLAN tags (num_of_vlans) is not supported" },
	{ FLOW_DISSECTOR_KEY_PPPOE, "simnic: match on PPPoE (pppoe_sid, ppp_proto) is not supported" },
	{ FLOW_DISSECTOR_KEY_L2TPV3, "simnic: match on L2TPv3 (l2tpv3_sid) is not supported" },
	SIMNIC_COMPAT_REFUSED_KEYS
};

#define SIMNIC_KEYS (BIT_ULL(FLOW_DISSECTOR_KEY_META) |		\
		     BIT_ULL(FLOW_DISSECTOR_KEY_CONTROL) |		\
		     BIT_ULL(FLOW_DISSECTOR_KEY_BASIC) |		\
		     BIT_ULL(FLOW_DISSECTOR_KEY_ETH_ADDRS) |		\
		     BIT_ULL(FLOW_DISSECTOR_KEY_VLAN) |			\
		     BIT_ULL(FLOW_DISSECTOR_KEY_CVLAN) |		\
		     BIT_ULL(FLOW_DISSECTOR_KEY_IPV4_ADDRS) |		\
		     BIT_ULL(FLOW_DISSECTOR_KEY_IPV6_ADDRS) |		\
		     BIT_ULL(FLOW_DISSECTOR_KEY_PORTS) |		\
		     BIT_ULL(FLOW_DISSECTOR_KEY_TCP) |			\
		     BIT_ULL(FLOW_DISSECTOR_KEY_IP))

/* A mask that is not all zeroes. */
#define simnic_asks(mask) (!!memchr_inv(mask, 0, sizeof(*(mask))))

static int simnic_match_keys(const struct flow_rule *rule, struct netlink_ext_ack *extack)
{
	u64 unknown = rule->match.dissector->used_keys & ~SIMNIC_KEYS;
	int i;

	if (!unknown)
		return 0;
	for (i = 0; i < ARRAY_SIZE(simnic_refused_keys); i++) {
		if (unknown & BIT_ULL(simnic_refused_keys[i].key)) {
			simnic_refuse(extack, simnic_refused_keys[i].text);
			return -EOPNOTSUPP;
		}
	}
	NL_SET_ERR_MSG_MOD(extack, "match on a key that this driver does not know");
	return -EOPNOTSUPP;
}

static int simnic_match_meta(struct simnic_port *port, bool ft, const struct flow_rule *rule,
			     struct netlink_ext_ack *extack)
{
	struct flow_match_meta meta;

	if (!flow_rule_match_key(rule, FLOW_DISSECTOR_KEY_META))
		return 0;
	flow_rule_match_meta(rule, &meta);
	if (meta.mask->ingress_iftype || simnic_compat_l2_miss(meta.mask)) {
		NL_SET_ERR_MSG_MOD(extack, "match on the interface type or an L2 miss (l2_miss) is not supported");
		return -EOPNOTSUPP;
	}
	if (!meta.mask->ingress_ifindex)
		return 0;
	/* Every port of a flowtable is offered every rule: only its own are for it. */
	if (meta.key->ingress_ifindex != port->dev->ifindex) {
		NL_SET_ERR_MSG_MOD(extack, "match on another ingress netdev (indev) than the rule's own");
		return -EOPNOTSUPP;
	}
	if (!ft && !simnic_supports(port, SIMNIC_F_KEY_INDEV, extack))
		return -EOPNOTSUPP;
	return 0;
}

static int simnic_match_control(struct simnic_port *port, const struct flow_rule *rule,
				struct simnic_key *key, struct simnic_key *mask,
				struct netlink_ext_ack *extack)
{
	struct flow_match_control control;

	if (!flow_rule_match_key(rule, FLOW_DISSECTOR_KEY_CONTROL))
		return 0;
	flow_rule_match_control(rule, &control);
	if (control.mask->flags & ~(FLOW_DIS_IS_FRAGMENT | FLOW_DIS_FIRST_FRAG)) {
		NL_SET_ERR_MSG_MOD(extack, "match on flags (ip_flags) other than frag and firstfrag is not supported");
		return -EOPNOTSUPP;
	}
	if (!control.mask->flags)
		return 0;
	if (!simnic_supports(port, SIMNIC_F_KEY_FRAG, extack))
		return -EOPNOTSUPP;
	if (control.mask->flags & FLOW_DIS_IS_FRAGMENT) {
		mask->ip_flags |= SIMNIC_IP_FRAGMENT;
		if (control.key->flags & FLOW_DIS_IS_FRAGMENT)
			key->ip_flags |= SIMNIC_IP_FRAGMENT;
	}
	if (control.mask->flags & FLOW_DIS_FIRST_FRAG) {
		mask->ip_flags |= SIMNIC_IP_FIRST_FRAG;
		if (control.key->flags & FLOW_DIS_FIRST_FRAG)
			key->ip_flags |= SIMNIC_IP_FIRST_FRAG;
	}
	return 0;
}

static int simnic_match_basic(struct simnic_port *port, const struct flow_rule *rule,
			      struct simnic_key *key, struct simnic_key *mask,
			      struct netlink_ext_ack *extack)
{
	struct flow_match_basic basic;

	if (!flow_rule_match_key(rule, FLOW_DISSECTOR_KEY_BASIC))
		return 0;
	flow_rule_match_basic(rule, &basic);
	key->n_proto = basic.key->n_proto;
	mask->n_proto = basic.mask->n_proto;
	if (!basic.mask->ip_proto)
		return 0;
	if (!simnic_supports(port, SIMNIC_F_KEY_IP_PROTO, extack))
		return -EOPNOTSUPP;
	key->ip_proto = basic.key->ip_proto;
	mask->ip_proto = basic.mask->ip_proto;
	/* Malformed IP has no protocol. */
	key->ip_version = basic.key->n_proto == htons(ETH_P_IPV6) ? 6 : 4;
	mask->ip_version = 0xff;
	return 0;
}

static void simnic_match_tag(const struct flow_match_vlan *vlan, struct simnic_tag *key,
			     struct simnic_tag *mask)
{
	key->tpid = vlan->key->vlan_tpid;
	mask->tpid = vlan->mask->vlan_tpid;
	key->tci = htons(vlan->key->vlan_id | vlan->key->vlan_priority << VLAN_PRIO_SHIFT);
	mask->tci = htons(vlan->mask->vlan_id | vlan->mask->vlan_priority << VLAN_PRIO_SHIFT);
	key->next = vlan->key->vlan_eth_type;
	mask->next = vlan->mask->vlan_eth_type;
}

static int simnic_match_l2(struct simnic_port *port, const struct flow_rule *rule,
			   struct simnic_key *key, struct simnic_key *mask,
			   struct netlink_ext_ack *extack)
{
	struct flow_match_eth_addrs eth;
	struct flow_match_vlan vlan;

	if (flow_rule_match_key(rule, FLOW_DISSECTOR_KEY_ETH_ADDRS)) {
		flow_rule_match_eth_addrs(rule, &eth);
		if (simnic_asks(eth.mask) && !simnic_supports(port, SIMNIC_F_KEY_ETH, extack))
			return -EOPNOTSUPP;
		ether_addr_copy(key->eth_dst, eth.key->dst);
		ether_addr_copy(mask->eth_dst, eth.mask->dst);
		ether_addr_copy(key->eth_src, eth.key->src);
		ether_addr_copy(mask->eth_src, eth.mask->src);
	}
	if (flow_rule_match_key(rule, FLOW_DISSECTOR_KEY_VLAN)) {
		flow_rule_match_vlan(rule, &vlan);
		if (!simnic_supports(port, SIMNIC_F_KEY_VLAN, extack))
			return -EOPNOTSUPP;
		simnic_match_tag(&vlan, &key->tags[0], &mask->tags[0]);
	}
	if (flow_rule_match_key(rule, FLOW_DISSECTOR_KEY_CVLAN)) {
		flow_rule_match_cvlan(rule, &vlan);
		if (!simnic_supports(port, SIMNIC_F_KEY_CVLAN, extack))
			return -EOPNOTSUPP;
		simnic_match_tag(&vlan, &key->tags[1], &mask->tags[1]);
	}
	return 0;
}

static int simnic_match_addrs(struct simnic_port *port, const struct flow_rule *rule,
			      struct simnic_key *key, struct simnic_key *mask,
			      struct netlink_ext_ack *extack)
{
	struct flow_match_control control;
	struct flow_match_ipv4_addrs ipv4;
	struct flow_match_ipv6_addrs ipv6;
	u16 addr_type = 0;

	if (flow_rule_match_key(rule, FLOW_DISSECTOR_KEY_CONTROL)) {
		flow_rule_match_control(rule, &control);
		addr_type = control.key->addr_type;
	}
	if (addr_type == FLOW_DISSECTOR_KEY_IPV4_ADDRS &&
	    flow_rule_match_key(rule, FLOW_DISSECTOR_KEY_IPV4_ADDRS)) {
		flow_rule_match_ipv4_addrs(rule, &ipv4);
		if (!simnic_supports(port, SIMNIC_F_KEY_IPV4, extack))
			return -EOPNOTSUPP;
		key->src.s6_addr32[0] = ipv4.key->src;
		mask->src.s6_addr32[0] = ipv4.mask->src;
		key->dst.s6_addr32[0] = ipv4.key->dst;
		mask->dst.s6_addr32[0] = ipv4.mask->dst;
		key->ip_version = 4;
		mask->ip_version = 0xff;
	}
	if (addr_type == FLOW_DISSECTOR_KEY_IPV6_ADDRS &&
	    flow_rule_match_key(rule, FLOW_DISSECTOR_KEY_IPV6_ADDRS)) {
		flow_rule_match_ipv6_addrs(rule, &ipv6);
		if (!simnic_supports(port, SIMNIC_F_KEY_IPV6, extack))
			return -EOPNOTSUPP;
		key->src = ipv6.key->src;
		mask->src = ipv6.mask->src;
		key->dst = ipv6.key->dst;
		mask->dst = ipv6.mask->dst;
		key->ip_version = 6;
		mask->ip_version = 0xff;
	}
	return 0;
}

static int simnic_match_l4(struct simnic_port *port, const struct flow_rule *rule,
			   struct simnic_key *key, struct simnic_key *mask,
			   struct netlink_ext_ack *extack)
{
	struct flow_match_ports ports;
	struct flow_match_tcp tcp;
	struct flow_match_ip ip;

	if (flow_rule_match_key(rule, FLOW_DISSECTOR_KEY_PORTS)) {
		flow_rule_match_ports(rule, &ports);
		if (simnic_asks(ports.mask) && !simnic_supports(port, SIMNIC_F_KEY_PORTS, extack))
			return -EOPNOTSUPP;
		key->src_port = ports.key->src;
		mask->src_port = ports.mask->src;
		key->dst_port = ports.key->dst;
		mask->dst_port = ports.mask->dst;
	}
	if (flow_rule_match_key(rule, FLOW_DISSECTOR_KEY_TCP)) {
		flow_rule_match_tcp(rule, &tcp);
		if (tcp.mask->flags && !simnic_supports(port, SIMNIC_F_KEY_TCP_FLAGS, extack))
			return -EOPNOTSUPP;
		key->tcp_flags = tcp.key->flags;
		mask->tcp_flags = tcp.mask->flags;
	}
	if (flow_rule_match_key(rule, FLOW_DISSECTOR_KEY_IP)) {
		flow_rule_match_ip(rule, &ip);
		if ((ip.mask->tos && !simnic_supports(port, SIMNIC_F_KEY_TOS, extack)) ||
		    (ip.mask->ttl && !simnic_supports(port, SIMNIC_F_KEY_TTL, extack)))
			return -EOPNOTSUPP;
		key->tos = ip.key->tos;
		mask->tos = ip.mask->tos;
		key->ttl = ip.key->ttl;
		mask->ttl = ip.mask->ttl;
	}
	return 0;
}

/**
 * simnic_match_parse() - translates a match
 * @port: the port that the rule is for
 * @ft: whether it is the flowtable's
 * @f: what the kernel asks
 * @key: what to compare with, filled in
 * @mask: the bits to compare, filled in
 *
 * Return: 0, or -EOPNOTSUPP with a reason in @f's extack.
 */
int simnic_match_parse(struct simnic_port *port, bool ft, struct flow_cls_offload *f,
		       struct simnic_key *key, struct simnic_key *mask)
{
	const struct flow_rule *rule = flow_cls_offload_flow_rule(f);
	struct netlink_ext_ack *extack = f->common.extack;
	int err;

	memset(key, 0, sizeof(*key));
	memset(mask, 0, sizeof(*mask));

	err = simnic_match_keys(rule, extack);
	if (!err)
		err = simnic_match_meta(port, ft, rule, extack);
	if (!err)
		err = simnic_match_control(port, rule, key, mask, extack);
	if (!err)
		err = simnic_match_basic(port, rule, key, mask, extack);
	if (!err)
		err = simnic_match_l2(port, rule, key, mask, extack);
	if (!err)
		err = simnic_match_addrs(port, rule, key, mask, extack);
	if (!err)
		err = simnic_match_l4(port, rule, key, mask, extack);
	if (err)
		return err;

	if (ft) {
		/* Exactly the tags that are named, and only plain packets. */
		key->n_tags = !!mask->tags[0].tpid + !!mask->tags[1].tpid;
		mask->n_tags = 0xff;
		mask->ip_flags |= SIMNIC_IP_EXTENDED | SIMNIC_IP_FRAGMENT;
	} else if (f->common.protocol != htons(ETH_P_ALL)) {
		/* The filter's own protocol is that of the first EtherType, as in software. */
		key->protocol = f->common.protocol;
		mask->protocol = htons(0xffff);
	}
	return 0;
}
