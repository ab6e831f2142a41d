/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs between the kernels that this driver is built for: 6.1 to 7.3.
 */
#ifndef SIMNIC_COMPAT_H
#define SIMNIC_COMPAT_H

#include <linux/netdevice.h>
#include <linux/version.h>
#include <net/devlink.h>
#include <net/flow_dissector.h>
#include <net/rtnetlink.h>

/* A device without transmit locks: a feature bit first, a field of its own later. */
static inline void simnic_compat_set_lltx(struct net_device *dev)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
	dev->lltx = true;
#else
	dev->features |= NETIF_F_LLTX;
#endif
}

/* Match keys that came later: { key, text } for the table of those which are refused. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0)
#define SIMNIC_COMPAT_REFUSED_KEYS					\
	{ FLOW_DISSECTOR_KEY_CFM, "simnic: match on CFM (cfm) is not supported" }, \
	{ FLOW_DISSECTOR_KEY_IPSEC, "simnic: match on an SPI (spi) is not supported" },
#else
#define SIMNIC_COMPAT_REFUSED_KEYS
#endif

/* Whether a rule asks for what a bridge could not forward. */
static inline bool simnic_compat_l2_miss(const struct flow_dissector_key_meta *mask)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0)
	return mask->l2_miss;
#else
	return false;
#endif
}

/* Reloads have to be asked for, before there are ops that say so. */
static inline void simnic_compat_devlink_reload(struct devlink *dl)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
	devlink_set_features(dl, DEVLINK_F_RELOAD);
#endif
}

/*
 * SIMNIC_COMPAT_NEWLINK(newlink, create): newlink() of a link's ops, which calls create(net, dev, tb, data,
 * extack). From 6.15 on the core finds out which namespace the other end is to be in, by peer_type; before,
 * net is where the request came from. simnic_compat_get_peer_net(): that namespace, held.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 15, 0)
#define SIMNIC_COMPAT_PEER_TYPE	.peer_type = VETH_INFO_PEER,
#define SIMNIC_COMPAT_NEWLINK(newlink, create)						\
static int newlink(struct net_device *dev, struct rtnl_newlink_params *params,		\
		   struct netlink_ext_ack *extack)					\
{											\
	return create(rtnl_newlink_peer_net(params), dev, params->tb, params->data, extack); \
}

static inline struct net *simnic_compat_get_peer_net(struct net *net, struct nlattr *tb[])
{
	return get_net(net);
}
#else
#define SIMNIC_COMPAT_PEER_TYPE
#define SIMNIC_COMPAT_NEWLINK(newlink, create)						\
static int newlink(struct net *src_net, struct net_device *dev, struct nlattr *tb[],	\
		   struct nlattr *data[], struct netlink_ext_ack *extack)		\
{											\
	return create(src_net, dev, tb, data, extack);					\
}

static inline struct net *simnic_compat_get_peer_net(struct net *net, struct nlattr *tb[])
{
	return rtnl_link_get_net(net, tb);
}
#endif

#endif /* SIMNIC_COMPAT_H */
