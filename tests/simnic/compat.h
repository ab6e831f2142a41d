/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs between the kernels that this driver is built for: 6.1 and 6.12.
 */
#ifndef SIMNIC_COMPAT_H
#define SIMNIC_COMPAT_H

#include <linux/netdevice.h>
#include <linux/version.h>
#include <net/flow_dissector.h>

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

#endif /* SIMNIC_COMPAT_H */
