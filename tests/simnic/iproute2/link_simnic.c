// SPDX-License-Identifier: GPL-2.0
/*
 * Teaches ip(8) the arguments of `ip link add ... type simnic peer ...`, which are those of veth.
 *
 * ip(8) refuses arguments of a kind that it does not know, and asks $IP_LIB_DIR/link_KIND.so for the
 * kind's symbol KIND_link_util. This one is a copy of ip's own for veth. The start of the struct is
 * that of iproute2's ip/ip_common.h.
 */
struct link_util {
	struct link_util *next;
	const char	*id;
	int		maxattr;
	void		*calls[6];
};

extern struct link_util veth_link_util;

struct link_util simnic_link_util;

__attribute__((constructor)) static void simnic_link_util_init(void)
{
	simnic_link_util = veth_link_util;
	simnic_link_util.next = 0;
	simnic_link_util.id = "simnic";
}
