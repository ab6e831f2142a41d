// SPDX-License-Identifier: Apache-2.0
/*
 * Forwards the packets of offloaded connections: one program, for the two places where a port can have it.
 *
 *   forward_xdp   XDP of the driver: a frame, before there is an skb
 *   forward_tc    tcx, or cls_bpf in direct-action mode: an skb, before the stack is given it
 *
 * Both read the headers, leave to the stack what it would not forward as it is, look the tuple up in the port's
 * table, and do to what they find what the router would do: VLAN tag, MAC addresses, addresses and ports,
 * TTL, checksums; then they redirect it. **Whatever is not found, does not fit or cannot be done goes up the
 * stack, untouched**: nothing is dropped here. So everything that can fail comes before the first byte that is
 * written.
 *
 * What the stack gets, as `ip_rcv_core`, `ip6_rcv_core` and conntrack (`tcp_error`, `udp_error`) see it:
 * fragments, IPv4 options, IPv6 extension headers, TTL and hop limit 0 and 1, a wrong IPv4 header checksum, lengths
 * that do not fit the frame, TCP and UDP headers that are none, of TCP all but plain segments with ACK, what is too
 * long for the way out, priority tags and second tags. Not looked at is the L4 checksum, over all the bytes of a
 * packet: it is changed by the difference, so that a wrong one stays wrong.
 *
 * Only helpers that any licence may call are called.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#define SEC(name) __attribute__((section(name), used))
#undef __always_inline /* what the kernel's headers make of it is only a hint */
#define __always_inline inline __attribute__((always_inline))
#define __uint(name, value) int (*name)[value]
#define __array(name, value) typeof(value) *name[]
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define to_be16(x) ((__be16)__builtin_bswap16(x))
#else
#define to_be16(x) ((__be16)(x))
#endif
#define from_be16(x) ((__u16)to_be16(x))

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const bpf_redirect_map)(void *map, __u64 key, __u64 flags) = (void *)BPF_FUNC_redirect_map;
static long (*const bpf_redirect)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect;
static long (*const bpf_xdp_adjust_head)(struct xdp_md *, int delta) = (void *)BPF_FUNC_xdp_adjust_head;
static __u64 (*const bpf_xdp_get_buff_len)(struct xdp_md *) = (void *)BPF_FUNC_xdp_get_buff_len;
static long (*const bpf_skb_pull_data)(struct __sk_buff *, __u32 len) = (void *)BPF_FUNC_skb_pull_data;
static long (*const bpf_skb_store_bytes)(struct __sk_buff *, __u32 offset, const void *from, __u32 len, __u64 flags) =
	(void *)BPF_FUNC_skb_store_bytes;
static long (*const bpf_l4_csum_replace)(struct __sk_buff *, __u32 offset, __u64 from, __u64 to, __u64 flags) =
	(void *)BPF_FUNC_l4_csum_replace;
static __s64 (*const bpf_csum_update)(struct __sk_buff *, __u32 csum) = (void *)BPF_FUNC_csum_update;
static long (*const bpf_skb_vlan_push)(struct __sk_buff *, __be16 proto, __u16 tci) = (void *)BPF_FUNC_skb_vlan_push;
static long (*const bpf_skb_vlan_pop)(struct __sk_buff *) = (void *)BPF_FUNC_skb_vlan_pop;

/* --- What is shared with entry.rs: a change here is one there, and of LAYOUT in it ------------------------- */

/* The packets of a flow. Unused bytes are 0: they are part of the key. */
struct key {
	__u8 src[16]; /* of IPv4: the first four */
	__u8 dst[16];
	__be16 sport;
	__be16 dport;
	__be16 vlan; /* 0: not tagged */
	__u8 family; /* 4, 6 */
	__u8 proto;
};

enum {
	MATCH_MAC = 1, /* only frames for eth_match */
	ROUTED = 2, /* new MAC addresses, one off the TTL; else bridged */
	NAT = 4,
	FRAGS = 8, /* XDP: the netdev sends frames that lie in several buffers */
};

/* What is done to them. Written once, whole; only the counters change. */
struct flow {
	__u64 packets;
	__u64 bytes; /* of whole frames */
	__u8 cookie[16];
	__u32 rule; /* its number, to the provider */
	__u32 egress; /* ifindex */
	__u32 mtu; /* of IP packets */
	__be16 vlan; /* the tag it leaves with; 0: none */
	__u8 flags;
	__u8 unused;
	__u8 eth_match[6];
	__u8 eth_dst[6];
	__u8 eth_src[6];
	__be16 sport;
	__be16 dport;
	__u8 unused2[2];
	__u8 src[16];
	__u8 dst[16];
	/* What the new bytes add to a one's complement sum of the old ones, folded: */
	__u32 address_diff; /* addresses */
	__u32 port_diff; /* ports */
};

_Static_assert(sizeof(struct key) == 40, "as entry.rs has it");
_Static_assert(sizeof(struct flow) == 112, "as entry.rs has it");

/* A port's table. A flush puts another in its place. Memory comes with the entries. */
struct flow_table {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(key_size, sizeof(struct key));
	__uint(value_size, sizeof(struct flow));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__array(values, struct flow_table);
} current_flows SEC(".maps");

/* Netdevs that flows leave by, by ifindex. The kernel takes out those that go. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP_HASH);
	__uint(max_entries, 1024);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} egress_netdevs SEC(".maps");

/* --- Reading ------------------------------------------------------------------------------------------------ */

enum {
	TAG = 4, /* bytes of an 802.1Q tag */
	SHORTEST = 46, /* what an Ethernet frame has at least behind its header: what is shorter is padded */
	HEADERS = sizeof(struct ethhdr) + TAG + sizeof(struct ipv6hdr) + sizeof(struct tcphdr),
	FRAGMENT = 0x3fff, /* more fragments, offset */
	TCP_FLAGS = 0x17, /* ACK, RST, SYN, FIN */
	TCP_ACK = 0x10,
	BE_ETH_P_IP = to_be16(ETH_P_IP),
	BE_ETH_P_IPV6 = to_be16(ETH_P_IPV6),
	BE_ETH_P_8021Q = to_be16(ETH_P_8021Q),
};

struct tag {
	__be16 tci;
	__be16 ethertype;
};

/* What was read of a packet that the stack would forward as it is. */
struct packet {
	struct key key;
	__u32 total; /* bytes of the IP packet */
	__u32 headers; /* of IP and L4 */
};

static __always_inline __u32 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* A sum of 16-bit words, as the checksum of a header is one. */
static __always_inline __u32 sum_of(const void *words, int bytes)
{
	const __u16 *word = words;
	__u32 sum = 0;

#pragma unroll
	for (int i = 0; i < bytes / 2; i++)
		sum += word[i];
	return fold(sum);
}

/*
 * How long the packet is that says of itself to be `said` bytes, where the frame has room for `room`: 0 if that
 * cannot be. Both are counted from where a header counts, where an Ethernet frame has `shortest` at least. What
 * GRO has put together beyond 64 kB says 0.
 */
static __always_inline __u32 length(__u32 said, __u32 room, __u32 shortest, __u32 gso_size)
{
	if (unlikely(!said))
		return gso_size ? room : 0;
	if (said > room || (said < room && room > shortest))
		return 0;
	return said;
}

/* TCP and UDP: what conntrack would take, of `len` bytes. */
static __always_inline int read_l4(struct packet *p, const void *l4, const void *end, __u32 len)
{
	const struct udphdr *udp = l4;

	/* The ports of both stand where they do in UDP. */
	if (unlikely((void *)(udp + 1) > end))
		return -1;
	p->key.sport = udp->source;
	p->key.dport = udp->dest;
	if (p->key.proto == IPPROTO_UDP) {
		__u32 said = from_be16(udp->len);

		p->headers += sizeof(*udp);
		return said < sizeof(*udp) || said > len ? -1 : 0;
	}
	if (p->key.proto == IPPROTO_TCP) {
		const struct tcphdr *tcp = l4;
		const __u8 *byte = l4;
		__u32 header;

		if (unlikely((void *)(tcp + 1) > end))
			return -1;
		header = byte[12] >> 4 << 2;
		p->headers += header;
		if (header < sizeof(*tcp) || header > len)
			return -1;
		return (byte[13] & TCP_FLAGS) == TCP_ACK ? 0 : -1;
	}
	return -1;
}

/* `room`: bytes of the frame behind its Ethernet header and tag. */
static __always_inline int read_ipv4(struct packet *p, const void *l3, const void *end, __u32 room, __u32 gso_size)
{
	const struct iphdr *ip = l3;

	if (unlikely((void *)(ip + 1) > end))
		return -1;
	if (*(const __u8 *)l3 != 0x45 || ip->frag_off & to_be16(FRAGMENT) || ip->ttl < 2 ||
	    sum_of(ip, sizeof(*ip)) != 0xffff)
		return -1;
	p->total = length(from_be16(ip->tot_len), room, SHORTEST, gso_size);
	if (p->total < sizeof(*ip))
		return -1;
	p->headers = sizeof(*ip);
	__builtin_memcpy(p->key.src, &ip->saddr, 4);
	__builtin_memcpy(p->key.dst, &ip->daddr, 4);
	p->key.family = 4;
	p->key.proto = ip->protocol;
	return read_l4(p, ip + 1, end, p->total - sizeof(*ip));
}

static __always_inline int read_ipv6(struct packet *p, const void *l3, const void *end, __u32 room, __u32 gso_size)
{
	const struct ipv6hdr *ip = l3;
	__u32 len;

	if (unlikely((void *)(ip + 1) > end))
		return -1;
	if (*(const __u8 *)l3 >> 4 != 6 || ip->hop_limit < 2 || room < sizeof(*ip))
		return -1;
	len = length(from_be16(ip->payload_len), room - sizeof(*ip), SHORTEST - sizeof(*ip), gso_size);
	if (!len)
		return -1;
	p->total = len + sizeof(*ip);
	p->headers = sizeof(*ip);
	__builtin_memcpy(p->key.src, &ip->saddr, 16);
	__builtin_memcpy(p->key.dst, &ip->daddr, 16);
	p->key.family = 6;
	p->key.proto = ip->nexthdr;
	return read_l4(p, ip + 1, end, len);
}

static __always_inline int read_ip(struct packet *p, __be16 ethertype, const void *l3, const void *end, __u32 room,
				   __u32 gso_size)
{
	if (ethertype == BE_ETH_P_IP)
		return read_ipv4(p, l3, end, room, gso_size);
	if (ethertype == BE_ETH_P_IPV6)
		return read_ipv6(p, l3, end, room, gso_size);
	return -1;
}

static __always_inline int is_same_mac(const __u8 *a, const __u8 *b)
{
	return *(const __u32 *)a == *(const __u32 *)b && *(const __u16 *)(a + 4) == *(const __u16 *)(b + 4);
}

/* The flow of a packet, if it fits; its netdev may still be gone. */
static __always_inline struct flow *look_up(const struct packet *p, const __u8 *eth_dst, __u32 gso_size)
{
	__u32 first = 0, longest;
	struct flow *flow;
	void *flows;

	flows = bpf_map_lookup_elem(&current_flows, &first);
	if (unlikely(!flows))
		return 0;
	flow = bpf_map_lookup_elem(flows, &p->key);
	if (!flow)
		return 0;
	if (flow->flags & MATCH_MAC && !is_same_mac(eth_dst, flow->eth_match))
		return 0;
	/* Of what is to be segmented yet, a segment (skb_gso_network_seglen). */
	longest = gso_size ? p->headers + gso_size : p->total;
	return longest > flow->mtu ? 0 : flow;
}

/* --- Writing ------------------------------------------------------------------------------------------------ */

static __always_inline void count(struct flow *flow, __u32 packets, __u32 bytes)
{
	/* Several processors may forward one flow at a time. */
	__sync_fetch_and_add(&flow->packets, packets);
	__sync_fetch_and_add(&flow->bytes, bytes);
}

/* What one less in the first byte of a word adds to a sum. */
#define ONE_LESS ((__u16)~to_be16(0x0100))

/* A checksum, when what it covers has changed by `diff` (RFC 1624, equation 3). */
static __always_inline __u16 adjusted(__u16 check, __u32 diff)
{
	return (__u16)~fold((__u16)~check + diff);
}

static __always_inline void write_ipv4(struct iphdr *ip, const struct flow *flow)
{
	__u32 diff = 0;

	if (flow->flags & ROUTED) {
		ip->ttl--;
		diff += ONE_LESS;
	}
	if (flow->flags & NAT) {
		__builtin_memcpy(&ip->saddr, flow->src, 4);
		__builtin_memcpy(&ip->daddr, flow->dst, 4);
		diff += flow->address_diff;
	}
	ip->check = adjusted(ip->check, diff);
}

static __always_inline void write_ipv6(struct ipv6hdr *ip, const struct flow *flow)
{
	if (flow->flags & ROUTED)
		ip->hop_limit--;
	if (flow->flags & NAT) {
		__builtin_memcpy(&ip->saddr, flow->src, 16);
		__builtin_memcpy(&ip->daddr, flow->dst, 16);
	}
}

/* --- XDP ---------------------------------------------------------------------------------------------------- */

/* Ports and checksum of L4, in the frame. The headers have been read, and are there. */
static __always_inline int write_l4(void *l4, void *end, __u8 proto, const struct flow *flow)
{
	__u32 diff = flow->address_diff + flow->port_diff;
	struct udphdr *udp = l4;

	if (proto == IPPROTO_TCP) {
		struct tcphdr *tcp = l4;

		if (unlikely((void *)(tcp + 1) > end))
			return -1;
		tcp->check = adjusted(tcp->check, diff);
	} else {
		if (unlikely((void *)(udp + 1) > end))
			return -1;
		/* 0: it has none. One that would be 0 is sent as its equal. */
		if (udp->check) {
			__u16 check = adjusted(udp->check, diff);

			udp->check = check ? check : 0xffff;
		}
	}
	udp->source = flow->sport;
	udp->dest = flow->dport;
	return 0;
}

SEC("xdp.frags")
int forward_xdp(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end, *l3;
	struct ethhdr *eth = data, was;
	struct packet p = {};
	__be16 ethertype;
	struct flow *flow;
	int tagged, delta;
	__u32 len;

	l3 = eth + 1;
	if (unlikely(l3 > end))
		return XDP_PASS;
	ethertype = eth->h_proto;
	tagged = ethertype == BE_ETH_P_8021Q;
	if (tagged) {
		struct tag *tag = l3;

		if (unlikely((void *)(tag + 1) > end))
			return XDP_PASS;
		ethertype = tag->ethertype;
		p.key.vlan = tag->tci & to_be16(0x0fff);
		if (!p.key.vlan)
			return XDP_PASS;
		l3 = tag + 1;
	}
	len = bpf_xdp_get_buff_len(ctx);
	if (read_ip(&p, ethertype, l3, end, len - (l3 - data), 0))
		return XDP_PASS;
	flow = look_up(&p, eth->h_dest, 0);
	if (!flow)
		return XDP_PASS;
	if (unlikely(end - data != len) && !(flow->flags & FRAGS))
		return XDP_PASS;
	/* Nothing is sent yet: this notes where to, if the netdev is there. */
	if (bpf_redirect_map(&egress_netdevs, flow->egress, XDP_PASS) != XDP_REDIRECT)
		return XDP_PASS;
	was = *eth;
	delta = (tagged ? TAG : 0) - (flow->vlan ? TAG : 0);
	if (delta && bpf_xdp_adjust_head(ctx, delta))
		return XDP_PASS;

	/* From here on the packet is another: what was read is there, so that nothing fails any more. */
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	eth = data;
	l3 = eth + 1;
	if (flow->vlan) {
		struct tag *tag = l3;

		if (unlikely((void *)(tag + 1) > end))
			return XDP_ABORTED;
		tag->tci = flow->vlan;
		tag->ethertype = ethertype;
		ethertype = BE_ETH_P_8021Q;
		l3 = tag + 1;
	}
	if (unlikely(l3 > end))
		return XDP_ABORTED;
	if (flow->flags & ROUTED) {
		__builtin_memcpy(eth->h_dest, flow->eth_dst, ETH_ALEN);
		__builtin_memcpy(eth->h_source, flow->eth_src, ETH_ALEN);
	} else if (delta) {
		__builtin_memcpy(eth->h_dest, was.h_dest, ETH_ALEN);
		__builtin_memcpy(eth->h_source, was.h_source, ETH_ALEN);
	}
	eth->h_proto = ethertype;
	if (p.key.family == 4) {
		struct iphdr *ip = l3;

		if (unlikely((void *)(ip + 1) > end))
			return XDP_ABORTED;
		write_ipv4(ip, flow);
		l3 = ip + 1;
	} else {
		struct ipv6hdr *ip = l3;

		if (unlikely((void *)(ip + 1) > end))
			return XDP_ABORTED;
		write_ipv6(ip, flow);
		l3 = ip + 1;
	}
	if (flow->flags & NAT && write_l4(l3, end, p.key.proto, flow))
		return XDP_ABORTED;
	count(flow, 1, len);
	return XDP_REDIRECT;
}

/* --- tc ----------------------------------------------------------------------------------------------------- */

/*
 * The packet is written by helpers, not directly: a program that writes directly has every packet copied that
 * somebody else holds too, also those that are no flow's, and drops it where that fails.
 */

/* `ip_tos2prio`, by the two bits of IPTOS_TOS_MASK that count, four bits for each. */
static __always_inline __u32 priority_of(__u8 tos)
{
	return 0x4620 >> ((tos & 0x18) >> 1) & 0x0f;
}

/*
 * The L4 checksum, in each of the four states of an skb: bpf_l4_csum_replace changes what a CHECKSUM_PARTIAL has
 * there (the sum of the pseudo header) by the addresses alone, and keeps the sum of CHECKSUM_COMPLETE.
 */
static __always_inline void write_l4_check(struct __sk_buff *skb, __u32 l4, const struct packet *p,
					   const struct flow *flow)
{
	int udp = p->key.proto == IPPROTO_UDP;
	__u32 at = l4 + (udp ? __builtin_offsetof(struct udphdr, check) : __builtin_offsetof(struct tcphdr, check));
	__u64 zero_is_none = udp ? BPF_F_MARK_MANGLED_0 : 0;

	bpf_l4_csum_replace(skb, at, 0, flow->address_diff, BPF_F_PSEUDO_HDR | zero_is_none);
	/* For CHECKSUM_COMPLETE it has taken for granted that an IPv4 header checksum makes up for the addresses. */
	if (p->key.family == 6)
		bpf_csum_update(skb, flow->address_diff);
	bpf_l4_csum_replace(skb, at, 0, flow->port_diff, zero_is_none);
}

static __always_inline void write_skb(struct __sk_buff *skb, const struct packet *p, const struct flow *flow,
				      struct iphdr *ip4, struct ipv6hdr *ip6)
{
	struct {
		__be16 source, dest;
	} ports = { flow->sport, flow->dport };
	__u32 l4;

	if (p->key.family == 4) {
		l4 = ETH_HLEN + sizeof(*ip4);
		write_ipv4(ip4, flow);
		bpf_skb_store_bytes(skb, ETH_HLEN, ip4, sizeof(*ip4), 0);
		if (flow->flags & ROUTED)
			skb->priority = priority_of(ip4->tos);
	} else {
		l4 = ETH_HLEN + sizeof(*ip6);
		write_ipv6(ip6, flow);
		bpf_skb_store_bytes(skb, ETH_HLEN, ip6, sizeof(*ip6), 0);
		/* No header checksum makes up for the hop limit. */
		if (flow->flags & ROUTED)
			bpf_csum_update(skb, (__u16)~to_be16(1));
	}
	if (flow->flags & ROUTED) {
		__u8 macs[2 * ETH_ALEN];

		__builtin_memcpy(macs, flow->eth_dst, ETH_ALEN);
		__builtin_memcpy(macs + ETH_ALEN, flow->eth_src, ETH_ALEN);
		bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0);
	}
	if (flow->flags & NAT) {
		write_l4_check(skb, l4, p, flow);
		bpf_skb_store_bytes(skb, l4, &ports, sizeof(ports), 0);
	}
}

SEC("classifier")
int forward_tc(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 gso_size = skb->gso_size, segments, len = skb->len;
	struct iphdr ip4 = {};
	struct ipv6hdr ip6 = {};
	struct packet p = {};
	struct flow *flow;
	struct ethhdr *eth;

	/* Taken off by the stack, which keeps it beside the packet. */
	if (skb->vlan_present) {
		p.key.vlan = to_be16(skb->vlan_tci & 0x0fff);
		if (skb->vlan_proto != BE_ETH_P_8021Q || !p.key.vlan)
			return TC_ACT_UNSPEC;
	}
	if (unlikely(data + HEADERS > end) && data + len > end) {
		if (bpf_skb_pull_data(skb, len < HEADERS ? len : HEADERS))
			return TC_ACT_UNSPEC;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
	}
	eth = data;
	if (unlikely((void *)(eth + 1) > end))
		return TC_ACT_UNSPEC;
	if (read_ip(&p, eth->h_proto, eth + 1, end, len - ETH_HLEN, gso_size))
		return TC_ACT_UNSPEC;
	flow = look_up(&p, eth->h_dest, gso_size);
	if (!flow)
		return TC_ACT_UNSPEC;
	if (!bpf_map_lookup_elem(&egress_netdevs, &flow->egress))
		return TC_ACT_UNSPEC;
	if (p.key.family == 4) {
		if (unlikely((void *)(eth + 1) + sizeof(ip4) > end))
			return TC_ACT_UNSPEC;
		__builtin_memcpy(&ip4, eth + 1, sizeof(ip4));
	} else {
		if (unlikely((void *)(eth + 1) + sizeof(ip6) > end))
			return TC_ACT_UNSPEC;
		__builtin_memcpy(&ip6, eth + 1, sizeof(ip6));
	}
	/* All of it is ours alone, and writable, after this. */
	if (bpf_skb_pull_data(skb, ETH_HLEN + p.headers))
		return TC_ACT_UNSPEC;
	segments = skb->gso_segs;
	/* The tag is beside the packet: neither can fail. */
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return TC_ACT_UNSPEC;
	if (flow->vlan && bpf_skb_vlan_push(skb, BE_ETH_P_8021Q, from_be16(flow->vlan)))
		return TC_ACT_UNSPEC;
	write_skb(skb, &p, flow, &ip4, &ip6);
	count(flow, segments ? segments : 1, len);
	return bpf_redirect(flow->egress, 0);
}

SEC("license") const char LICENSE[] = "Apache-2.0";
