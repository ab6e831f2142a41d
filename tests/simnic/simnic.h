/* SPDX-License-Identifier: GPL-2.0 */
/*
 * simnic: a simulated NIC that offloads flows.
 *
 *   ip link add name p0 type simnic peer name w0
 *
 * makes one port of it. p0 is the port's netdev, which the host sees; w0 is the far end of the cable
 * that is plugged into that port, to be moved into the network namespace of whoever is to sit there.
 * All ports are one switch: a rule of any port may redirect to any other.
 *
 *      netns "lan"   |              the NIC                |     the host
 *                    |                                     |
 *   w0 --- frame ------> flow tables of port 0 -- miss ---------> p0 (receive)
 *                    |          | hit: redirect            |
 *   w1 <-----------------  port 1  <----------------------------- p1 (transmit)
 *
 * A wire carries what a wire carries: no segmentation or checksum is left to anybody (neither end
 * offers TSO or checksum offload, so the stack does both before), tags are in the frame, and nothing
 * of the skb but its bytes arrives. A frame that the flow tables forward touches neither the host's
 * stack nor the counters of p0.
 *
 * Where the datapath decides what other NICs decide differently:
 *
 *  - TC's rules come first, then the flowtable's, as in the host's own ingress path. TC: lowest
 *    chain, then lowest prio, then oldest mask; goto leads to a higher chain only.
 *  - A frame is either handled wholly or handed to the host as it arrived: these kernels have no
 *    TC_SKB_EXT, so that the host could not be told to go on in the middle. So rewriting is refused
 *    but before redirect and drop, and what misses in a later chain is new to the host.
 *  - What a rule cannot do with a frame goes to the host, counted as an exception and not for the
 *    rule: a TTL or hop limit that would end at 0 or is 0, a frame longer than the MTU of the port
 *    it would leave by (so that the host can send the ICMP error), a rewrite of a header that the
 *    frame lacks, new addresses for a fragment, whose checksum is elsewhere.
 *  - A redirect to a port that is gone, down or unplugged loses the frame, as act_mirred does.
 *  - Checksums are updated from what was rewritten, never computed anew: what was wrong stays wrong.
 *    TC rules ask for that with the csum action; without it the checksum is left as it is. The
 *    flowtable's rules get it always, and their TTL is decremented.
 *  - The flowtable's rules leave alone IP options, IPv6 extension headers and fragments.
 *  - vlan modify with priority 0 keeps the frame's priority: the offload API does not tell "0" from
 *    "not given".
 *
 * One directory in debugfs for each port: debugfs.c has the list. The port's phys_port_name
 * ("p3": `ip -d link show`) is the name of the directory. The whole NIC is a devlink instance, which
 * can be reloaded: devlink.c.
 *
 * Locking: a port's rules are changed under its mutex, whoever asks (TC with or without rtnl, the
 * flowtable's workers, debugfs); frames read them under RCU. Nothing takes rtnl inside that mutex.
 * Global state: the number for the next port, the list of ports, the debugfs root, the devlink instance,
 * the workqueue that frees groups and the counts of what is allocated.
 */
#ifndef SIMNIC_H
#define SIMNIC_H

#include <linux/bits.h>
#include <linux/if_vlan.h>
#include <linux/in6.h>
#include <linux/mutex.h>
#include <linux/netdevice.h>
#include <linux/rhashtable.h>
#include <net/flow_offload.h>

#define SIMNIC_DRV_NAME	"simnic"
#define SIMNIC_MAX_TAGS	2

struct simnic_port;

/* Bits of simnic_key.ip_flags. */
#define SIMNIC_IP_FRAGMENT	BIT(0)
#define SIMNIC_IP_FIRST_FRAG	BIT(1)
#define SIMNIC_IP_EXTENDED	BIT(2)	/* IPv4 options, IPv6 extension headers */

struct simnic_tag {
	__be16	tpid;
	__be16	tci;
	__be16	next;	/* the EtherType behind this tag */
};

/* What of a frame can be matched on. No padding: keys are hashed and compared as memory. */
struct simnic_key {
	u8		eth_dst[ETH_ALEN];
	u8		eth_src[ETH_ALEN];
	__be16		protocol;	/* the frame's first EtherType */
	__be16		n_proto;	/* the first one that is no tag's */
	struct simnic_tag tags[SIMNIC_MAX_TAGS];
	__be16		src_port;
	__be16		dst_port;
	__be16		tcp_flags;
	u8		n_tags;
	u8		ip_version;	/* 0: no IP, or malformed */
	u8		ip_proto;
	u8		ip_flags;
	u8		tos;
	u8		ttl;
	struct in6_addr	src;		/* IPv4: the first word */
	struct in6_addr	dst;
} __aligned(8);

/* A frame on its way through the tables. */
struct simnic_frame {
	struct sk_buff		*skb;	/* data points to the destination MAC */
	struct simnic_key	key;
	unsigned int		l3;	/* offset of what follows the tags */
	unsigned int		l4;	/* offset of the transport header; 0: none that can be read */
};

enum simnic_act_id {
	SIMNIC_ACT_MANGLE,
	SIMNIC_ACT_ADD,
	SIMNIC_ACT_CSUM,
	SIMNIC_ACT_VLAN_PUSH,
	SIMNIC_ACT_VLAN_POP,
	SIMNIC_ACT_VLAN_MODIFY,
	/* Those which end a rule. */
	SIMNIC_ACT_REDIRECT,
	SIMNIC_ACT_GOTO,
	SIMNIC_ACT_DROP,
	SIMNIC_ACT_TRAP,
	SIMNIC_ACT_PASS,
};

struct simnic_act {
	enum simnic_act_id id;
	union {
		struct {
			u8	htype;	/* enum flow_action_mangle_base */
			u8	offset;
			u32	mask;	/* bits to keep, in the order of the frame */
			u32	val;
		} mangle;
		struct {
			__be16	tpid;
			u16	vid;
			u8	prio;
		} vlan;
		u32			csum_flags;
		u32			chain;
		struct simnic_egress	*egress;
	};
};

/* What redirecting rules hold of the port they redirect to; it outlives the port. */
struct simnic_egress {
	struct simnic_port __rcu *port;
	refcount_t		refs;
	struct rcu_head		rcu;
};

enum simnic_rule_state {
	SIMNIC_RULE_NEW,
	SIMNIC_RULE_ACTIVE,	/* in the hardware */
	SIMNIC_RULE_SILENT,	/* in the hardware, where it matches nothing: knob "silent" */
	SIMNIC_RULE_ORPHAN,	/* in the hardware after a delete that failed: knob "fail_delete" */
	SIMNIC_RULE_LOST,	/* only the driver still knows it: knob "reset" */
};

struct simnic_rule {
	unsigned long		cookie;
	struct rhash_head	cookie_node;
	struct rhlist_head	key_node;
	struct list_head	list;
	struct simnic_group	*group;		/* NULL unless active or orphan */
	enum simnic_rule_state	state;
	struct simnic_key	key;		/* masked */
	u32			chain;
	u32			prio;
	bool			discard;	/* counts, and loses the frame: knob "silent" = 2 */

	/* What the actions need of a frame. */
	u8			need_version;
	u8			need_proto;
	bool			edits_ttl;
	bool			edits_addrs;

	enum flow_action_hw_stats hw_stats;
	atomic64_t		packets;
	atomic64_t		bytes;
	unsigned long		lastused;
	struct {		/* as last read from the hardware, and as told to the kernel */
		u64		packets;
		u64		bytes;
		u64		told_packets;
		u64		told_bytes;
		unsigned long	lastused;
		unsigned long	read_at;
	} stats;

	struct rcu_head		rcu;
	unsigned int		n_acts;
	struct simnic_act	acts[];
};

/* The rules of one chain, prio and mask, hashed by key. */
struct simnic_group {
	struct list_head	list;
	u32			chain;
	u32			prio;
	struct simnic_key	mask;
	struct rhltable		rules;
	unsigned int		n_rules;
	struct rcu_work		free_work;
};

struct simnic_table {
	const char		*name;
	struct list_head	groups;		/* by chain, then prio; RCU */
	struct list_head	rules;		/* all that the driver knows of */
	struct rhashtable	by_cookie;
};

/* Makes the call after `after` - 1 more fail, and the `count` - 1 next ones (0: all); 0: off. */
struct simnic_fault {
	u32	after;
	u32	count;
	int	error;
};

struct simnic_knobs {
	u32			capacity;
	u32			insert_latency_us;
	u32			stats_interval_ms;
	bool			stats_frozen;
	u32			silent;
	unsigned long		unsupported;	/* bits by enum simnic_feature */
	struct simnic_fault	fail_insert;
	struct simnic_fault	fail_delete;
	struct simnic_fault	fail_stats;
};

#define SIMNIC_COUNTERS(X)						\
	X(wire_rx)	/* frames that came from the wire */		\
	X(wire_tx)	/* frames that left on the wire */		\
	X(host_rx)	/* frames given to the host */			\
	X(host_tx)	/* frames that the host sent */			\
	X(hits)		/* frames that a rule acted on */		\
	X(misses)	/* frames that no rule matched */		\
	X(redirected)	/* frames sent out of some port */		\
	X(dropped)	/* frames dropped by a rule */			\
	X(trapped)	/* frames that a rule gave to the host */	\
	X(exceptions)	/* frames that a rule matched but could not act on */ \
	X(target_gone)	/* frames redirected to a port that is gone or down */ \
	X(oversize)	/* frames longer than the MTU of who should receive them */

enum simnic_counter {
#define X(name) SIMNIC_COUNTER_##name,
	SIMNIC_COUNTERS(X)
#undef X
	SIMNIC_N_COUNTERS
};

struct simnic_port {
	struct net_device		*dev;
	struct net_device __rcu		*wire;
	struct simnic_egress		*egress;
	unsigned int			id;

	struct mutex			lock;	/* of all below up to the lists */
	struct simnic_table		tc;
	struct simnic_table		ft;
	unsigned int			occupied;	/* entries of the hardware's table */
	struct simnic_knobs		knobs;
	struct list_head		tc_blocks;	/* rtnl */
	struct list_head		ft_blocks;	/* the nf_tables commit mutex of the netns */

	spinlock_t			link_lock;	/* of the carrier of both ends */
	bool				unplugged;
	struct delayed_work		replug;

	struct list_head		of_nic;		/* the ports of devlink.c */
	atomic64_t			counters[SIMNIC_N_COUNTERS];
	struct dentry			*debugfs;
};

#define simnic_count(port, name) \
	atomic64_inc(&(port)->counters[SIMNIC_COUNTER_##name])

/* What can be matched on and done: the names are those of knob "unsupported". */
#define SIMNIC_FEATURES(X)						\
	X(KEY_INDEV,	"match-indev",	"match on the ingress netdev (indev)") \
	X(KEY_ETH,	"match-eth",	"match on MAC addresses (dst_mac, src_mac)") \
	X(KEY_VLAN,	"match-vlan",	"match on a VLAN tag (vlan_id, vlan_prio)") \
	X(KEY_CVLAN,	"match-cvlan",	"match on an inner VLAN tag (cvlan_id, cvlan_prio)") \
	X(KEY_IPV4,	"match-ipv4",	"match on IPv4 addresses (src_ip, dst_ip)") \
	X(KEY_IPV6,	"match-ipv6",	"match on IPv6 addresses (src_ip, dst_ip)") \
	X(KEY_IP_PROTO,	"match-ip-proto", "match on the IP protocol (ip_proto)") \
	X(KEY_PORTS,	"match-ports",	"match on ports (src_port, dst_port)") \
	X(KEY_TCP_FLAGS, "match-tcp-flags", "match on TCP flags (tcp_flags)") \
	X(KEY_TOS,	"match-tos",	"match on the DS field (ip_tos)")	\
	X(KEY_TTL,	"match-ttl",	"match on the TTL (ip_ttl)")	\
	X(KEY_FRAG,	"match-frag",	"match on fragments (ip_flags)") \
	X(ACT_MANGLE,	"act-mangle",	"rewriting header fields (pedit)") \
	X(ACT_TTL,	"act-ttl",	"decrementing the TTL (pedit)")	\
	X(ACT_CSUM,	"act-csum",	"updating checksums (csum)")	\
	X(ACT_VLAN,	"act-vlan",	"changing VLAN tags (vlan)")	\
	X(ACT_REDIRECT,	"act-redirect",	"redirecting (mirred)")		\
	X(ACT_GOTO,	"act-goto",	"going to another chain (goto)") \
	X(ACT_DROP,	"act-drop",	"dropping (drop)")		\
	X(ACT_TRAP,	"act-trap",	"trapping (trap)")		\
	X(ACT_PASS,	"act-pass",	"passing to the host (pass)")

enum simnic_feature {
#define X(id, name, text) SIMNIC_F_##id,
	SIMNIC_FEATURES(X)
#undef X
	SIMNIC_N_FEATURES
};

/* What is allocated, for whoever looks for a leak. */
struct simnic_allocations {
	atomic_t ports;
	atomic_t egresses;
	atomic_t rules;
	atomic_t groups;
};

extern struct simnic_allocations simnic_allocations;

/* netdev.c: the two ends of a port, and frames between them. */
struct simnic_port *simnic_port_of(const struct net_device *dev);
struct simnic_egress *simnic_egress_get(struct simnic_port *port);
void simnic_egress_put(struct simnic_egress *egress);
bool simnic_port_send(struct simnic_port *port, struct sk_buff *skb);
void simnic_link_set(struct simnic_port *port, bool plugged);
void simnic_link_flap(struct simnic_port *port, unsigned int ms);

/* frame.c: what a frame says. */
void simnic_frame_parse(struct simnic_frame *frame, struct sk_buff *skb);
bool simnic_frame_is_tcp_or_udp(const struct simnic_frame *frame);

/* table.c: rules by cookie, and by chain, prio and mask. */
int simnic_table_init(struct simnic_table *table, const char *name);
void simnic_table_destroy(struct simnic_port *port, struct simnic_table *table);
void simnic_table_flush(struct simnic_port *port, struct simnic_table *table);
struct simnic_rule *simnic_table_find(struct simnic_table *table, unsigned long cookie);
int simnic_table_add(struct simnic_port *port, struct simnic_table *table,
		     struct simnic_rule *rule, const struct simnic_key *mask);
void simnic_table_del(struct simnic_port *port, struct simnic_table *table,
		      struct simnic_rule *rule);
void simnic_table_orphan(struct simnic_table *table, struct simnic_rule *rule);
void simnic_port_reset(struct simnic_port *port);
struct simnic_rule *simnic_table_lookup(const struct simnic_table *table, u32 chain,
					const struct simnic_key *key);
struct simnic_rule *simnic_rule_alloc(unsigned int n_acts);
void simnic_rule_free(struct simnic_rule *rule);
int simnic_tables_init(void);
void simnic_tables_exit(void);

/* match.c: what the kernel asks to match on. */
int simnic_match_parse(struct simnic_port *port, bool ft, struct flow_cls_offload *f,
		       struct simnic_key *key, struct simnic_key *mask);

/* actions.c: what the kernel asks to do, and doing it. */
enum simnic_verdict {
	SIMNIC_TO_HOST,
	SIMNIC_CONSUMED,
};

struct simnic_rule *simnic_actions_parse(struct simnic_port *port, bool ft,
					 struct flow_cls_offload *f);
enum simnic_verdict simnic_pipeline(struct simnic_port *port, struct sk_buff *skb);

/* flower.c: rules as both TC and the flowtable bring them. */
int simnic_cls(struct simnic_port *port, struct simnic_table *table, struct flow_cls_offload *f);
int simnic_setup_tc_block(struct simnic_port *port, struct flow_block_offload *f);
bool simnic_supports(const struct simnic_port *port, enum simnic_feature feature,
		     struct netlink_ext_ack *extack);
void simnic_refuse(struct netlink_ext_ack *extack, const char *text);

/* flowtable.c: binding of nf_flowtable. */
int simnic_setup_ft_block(struct simnic_port *port, struct flow_block_offload *f);

/* debugfs.c: knobs. */
extern const char * const simnic_counter_names[SIMNIC_N_COUNTERS];
void simnic_debugfs_port_add(struct simnic_port *port);
void simnic_debugfs_port_del(struct simnic_port *port);
void simnic_debugfs_init(void);
void simnic_debugfs_exit(void);

/* devlink.c: the NIC as a whole. */
void simnic_devlink_port_add(struct simnic_port *port);
void simnic_devlink_port_del(struct simnic_port *port);
int simnic_devlink_init(void);
void simnic_devlink_exit(void);

#endif /* SIMNIC_H */
