// SPDX-License-Identifier: GPL-2.0
/*
 * Reads of a frame what rules can match on: Ethernet, up to two VLAN tags, IPv4 and IPv6, ports and
 * TCP flags. What is malformed is not read further, and so no rule that asks for it matches.
 */
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <net/dsfield.h>
#include <net/ip.h>
#include <net/ipv6.h>

#include "simnic.h"

#define SIMNIC_MAX_EXT_HEADERS	8

static void simnic_parse_l4(struct simnic_frame *frame, unsigned int offset)
{
	struct simnic_key *key = &frame->key;
	struct {
		__be16	src;
		__be16	dst;
	} _ports, *ports;
	struct tcphdr _tcp, *tcp;

	switch (key->ip_proto) {
	case IPPROTO_TCP:
		tcp = skb_header_pointer(frame->skb, offset, sizeof(_tcp), &_tcp);
		if (!tcp)
			return;
		key->src_port = tcp->source;
		key->dst_port = tcp->dest;
		key->tcp_flags = cpu_to_be16(be32_to_cpu(tcp_flag_word(tcp)) >> 16 & 0x0fff);
		break;
	case IPPROTO_UDP:
		if (frame->skb->len < offset + sizeof(struct udphdr))
			return;
		fallthrough;
	case IPPROTO_SCTP:
	case IPPROTO_UDPLITE:
	case IPPROTO_DCCP:
		ports = skb_header_pointer(frame->skb, offset, sizeof(_ports), &_ports);
		if (!ports)
			return;
		key->src_port = ports->src;
		key->dst_port = ports->dst;
		break;
	default:
		return;
	}
	frame->l4 = offset;
}

static void simnic_parse_ipv4(struct simnic_frame *frame)
{
	struct simnic_key *key = &frame->key;
	unsigned int hlen, tot_len;
	struct iphdr _iph, *iph;

	iph = skb_header_pointer(frame->skb, frame->l3, sizeof(_iph), &_iph);
	if (!iph || iph->version != 4)
		return;
	hlen = iph->ihl * 4;
	tot_len = ntohs(iph->tot_len);
	if (hlen < sizeof(*iph) || tot_len < hlen || frame->skb->len < frame->l3 + tot_len)
		return;

	key->ip_version = 4;
	key->ip_proto = iph->protocol;
	key->tos = iph->tos;
	key->ttl = iph->ttl;
	key->src.s6_addr32[0] = iph->saddr;
	key->dst.s6_addr32[0] = iph->daddr;
	if (hlen != sizeof(*iph))
		key->ip_flags |= SIMNIC_IP_EXTENDED;
	if (ip_is_fragment(iph)) {
		key->ip_flags |= SIMNIC_IP_FRAGMENT;
		if (!(iph->frag_off & htons(IP_OFFSET)))
			key->ip_flags |= SIMNIC_IP_FIRST_FRAG;
		return;
	}
	simnic_parse_l4(frame, frame->l3 + hlen);
}

static void simnic_parse_ipv6(struct simnic_frame *frame)
{
	unsigned int offset = frame->l3 + sizeof(struct ipv6hdr);
	struct simnic_key *key = &frame->key;
	struct ipv6hdr _ip6h, *ip6h;
	struct ipv6_opt_hdr _opt, *opt;
	struct frag_hdr _frag, *frag;
	int i;

	ip6h = skb_header_pointer(frame->skb, frame->l3, sizeof(_ip6h), &_ip6h);
	if (!ip6h || ip6h->version != 6 ||
	    frame->skb->len < offset + ntohs(ip6h->payload_len))
		return;

	key->ip_version = 6;
	key->ip_proto = ip6h->nexthdr;
	key->tos = ipv6_get_dsfield(ip6h);
	key->ttl = ip6h->hop_limit;
	key->src = ip6h->saddr;
	key->dst = ip6h->daddr;

	for (i = 0; i < SIMNIC_MAX_EXT_HEADERS; i++) {
		switch (key->ip_proto) {
		case NEXTHDR_HOP:
		case NEXTHDR_ROUTING:
		case NEXTHDR_DEST:
			key->ip_flags |= SIMNIC_IP_EXTENDED;
			opt = skb_header_pointer(frame->skb, offset, sizeof(_opt), &_opt);
			if (!opt)
				return;
			key->ip_proto = opt->nexthdr;
			offset += ipv6_optlen(opt);
			break;
		case NEXTHDR_FRAGMENT:
			frag = skb_header_pointer(frame->skb, offset, sizeof(_frag), &_frag);
			if (!frag)
				return;
			key->ip_proto = frag->nexthdr;
			key->ip_flags |= SIMNIC_IP_EXTENDED | SIMNIC_IP_FRAGMENT;
			if (!(frag->frag_off & htons(IP6_OFFSET)))
				key->ip_flags |= SIMNIC_IP_FIRST_FRAG;
			return;
		default:
			simnic_parse_l4(frame, offset);
			return;
		}
	}
}

void simnic_frame_parse(struct simnic_frame *frame, struct sk_buff *skb)
{
	struct simnic_key *key = &frame->key;
	struct vlan_hdr _vlan, *vlan;
	const struct ethhdr *eth;

	memset(frame, 0, sizeof(*frame));
	frame->skb = skb;
	eth = (const struct ethhdr *)skb->data;
	ether_addr_copy(key->eth_dst, eth->h_dest);
	ether_addr_copy(key->eth_src, eth->h_source);
	key->protocol = eth->h_proto;
	key->n_proto = eth->h_proto;
	frame->l3 = ETH_HLEN;

	while (eth_type_vlan(key->n_proto) && key->n_tags < SIMNIC_MAX_TAGS) {
		struct simnic_tag *tag = &key->tags[key->n_tags];

		vlan = skb_header_pointer(skb, frame->l3, sizeof(_vlan), &_vlan);
		if (!vlan)
			return;
		tag->tpid = key->n_proto;
		tag->tci = vlan->h_vlan_TCI;
		tag->next = vlan->h_vlan_encapsulated_proto;
		key->n_proto = tag->next;
		key->n_tags++;
		frame->l3 += VLAN_HLEN;
	}

	if (key->n_proto == htons(ETH_P_IP))
		simnic_parse_ipv4(frame);
	else if (key->n_proto == htons(ETH_P_IPV6))
		simnic_parse_ipv6(frame);
}

bool simnic_frame_is_tcp_or_udp(const struct simnic_frame *frame)
{
	return frame->l4 &&
	       (frame->key.ip_proto == IPPROTO_TCP || frame->key.ip_proto == IPPROTO_UDP);
}
