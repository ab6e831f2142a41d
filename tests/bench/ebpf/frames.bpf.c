// SPDX-License-Identifier: Apache-2.0
/*
 * Frames for the benchmark of forwarding. BPF_PROG_TEST_RUN recycles frames as they were left, so `generate` writes
 * each anew and hands it on: to the program in `target`, or, where there is none, as `verdict` says.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, value) int (*name)[value]
#define to_be16(x) ((__be16)__builtin_bswap16(x))

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const bpf_redirect_map)(void *map, __u64 key, __u64 flags) = (void *)BPF_FUNC_redirect_map;
static long (*const bpf_tail_call)(void *ctx, void *map, __u32 index) = (void *)BPF_FUNC_tail_call;

/* What entry 0 of `setting` has. */
struct setting {
	__u32 flows;
	__u32 verdict;
	__u32 next;
	__u32 unused;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct setting));
} setting SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} target SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP_HASH);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} out SEC(".maps");

SEC("xdp.frags")
int generate(struct xdp_md *ctx)
{
	struct ethhdr *eth = (void *)(long)ctx->data;
	struct iphdr *ip = (void *)(eth + 1);
	struct udphdr *udp = (void *)(ip + 1);
	__u32 first = 0, sum, n;
	struct setting *s = bpf_map_lookup_elem(&setting, &first);
	__u16 *word = (void *)ip;

	if (!s || (void *)(udp + 1) > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	/* In an order that no cache foresees; one processor at a time. */
	s->next = s->next * 1664525 + 1013904223;
	n = (__u64)s->next * s->flows >> 32;
	__builtin_memcpy(eth->h_dest, "\2\0\0\0\1\1", 6);
	__builtin_memcpy(eth->h_source, "\2\0\0\0\1\2", 6);
	eth->h_proto = to_be16(ETH_P_IP);
	*(__u8 *)ip = 0x45;
	ip->tos = 0;
	ip->tot_len = to_be16(46);
	ip->id = 0;
	ip->frag_off = 0;
	ip->ttl = 64;
	ip->protocol = IPPROTO_UDP;
	ip->check = 0;
	ip->saddr = __builtin_bswap32(0x0a000000 | n);
	ip->daddr = __builtin_bswap32(0xcb007150);
	udp->source = to_be16(0xbeef);
	udp->dest = to_be16(443);
	udp->len = to_be16(26);
	udp->check = 0;
	sum = 0;
#pragma unroll
	for (int i = 0; i < 10; i++)
		sum += word[i];
	sum = (sum & 0xffff) + (sum >> 16);
	ip->check = ~((sum & 0xffff) + (sum >> 16));
	bpf_tail_call(ctx, &target, 0);
	return s->verdict;
}

/* What a redirect costs that looks nothing up. */
SEC("xdp.frags")
int redirect(struct xdp_md *ctx)
{
	struct ethhdr *eth = (void *)(long)ctx->data;

	if ((void *)(eth + 1) > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	__builtin_memcpy(eth->h_dest, "\2\0\0\0\2\2", 6);
	__builtin_memcpy(eth->h_source, "\2\0\0\0\2\1", 6);
	return bpf_redirect_map(&out, 0, XDP_ABORTED);
}

SEC("xdp.frags")
int drop_frame(struct xdp_md *ctx)
{
	return XDP_DROP;
}

SEC("classifier")
int drop_skb(struct __sk_buff *skb)
{
	return TC_ACT_SHOT;
}

SEC("license") const char LICENSE[] = "Apache-2.0";
