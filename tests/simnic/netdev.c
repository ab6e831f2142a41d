// SPDX-License-Identifier: GPL-2.0
/*
 * The netdevs of a port, which is the host's, and of the far end of its cable, "the wire"; frames
 * between them. What both have is a link that is up when both are up and the cable is plugged in.
 */
#include <linux/etherdevice.h>
#include <linux/ethtool.h>
#include <linux/module.h>
#include <linux/rtnetlink.h>
#include <linux/veth.h>
#include <net/rtnetlink.h>

#include "compat.h"
#include "simnic.h"

#define SIMNIC_MAX_MTU	9000

struct simnic_wire {
	struct simnic_port __rcu *port;
};

/* The number of the next port: names of its directory in debugfs are never used twice. */
static atomic_t simnic_next_port = ATOMIC_INIT(0);

/* All ports are ports of one switch. */
static const u8 simnic_switch_id[] = { 's', 'i', 'm', 'n', 'i', 'c' };

static const struct net_device_ops simnic_port_ops;
static const struct net_device_ops simnic_wire_ops;

static bool simnic_is_port(const struct net_device *dev)
{
	return dev->netdev_ops == &simnic_port_ops;
}

/**
 * simnic_port_of() - the port that a netdev is of
 * @dev: any netdev, of which the caller holds a reference
 *
 * Return: the port, or NULL when @dev is not the host's end of one.
 */
struct simnic_port *simnic_port_of(const struct net_device *dev)
{
	return simnic_is_port(dev) ? netdev_priv(dev) : NULL;
}

struct simnic_egress *simnic_egress_get(struct simnic_port *port)
{
	refcount_inc(&port->egress->refs);
	return port->egress;
}

void simnic_egress_put(struct simnic_egress *egress)
{
	if (!refcount_dec_and_test(&egress->refs))
		return;
	kfree_rcu(egress, rcu);
	atomic_dec(&simnic_allocations.egresses);
}

/* Whether frames pass between the ends of a port. */
static bool simnic_port_ready(const struct simnic_port *port)
{
	return netif_running(port->dev) && netif_carrier_ok(port->dev);
}

/* Whether a frame may be received: the MTU is for what follows the tags. */
static bool simnic_fits(const struct net_device *dev, const struct sk_buff *skb)
{
	const struct vlan_hdr *tag = (const struct vlan_hdr *)(skb->data + ETH_HLEN);
	__be16 proto = ((const struct ethhdr *)skb->data)->h_proto;
	unsigned int l3 = ETH_HLEN;
	int i;

	for (i = 0; i < SIMNIC_MAX_TAGS && eth_type_vlan(proto); i++, tag++) {
		l3 += VLAN_HLEN;
		if (skb->len < l3)
			return true;
		proto = tag->h_vlan_encapsulated_proto;
	}
	return skb->len - l3 <= READ_ONCE(dev->mtu);
}

/* What leaves on a wire is bytes: segmented, with checksums, and nothing of who sent them. */
static struct sk_buff *simnic_serialize(struct sk_buff *skb)
{
	if (WARN_ON_ONCE(skb_is_gso(skb)) || skb->len < ETH_HLEN || skb_linearize(skb))
		goto drop;
	if (skb->ip_summed == CHECKSUM_PARTIAL && skb_checksum_help(skb))
		goto drop;
	skb_scrub_packet(skb, true);
	skb->priority = 0;
	skb->ip_summed = CHECKSUM_NONE;
	return skb;

drop:
	kfree_skb(skb);
	return NULL;
}

/* Gives a frame to the stack of one end; data points to the destination MAC. */
static void simnic_receive(struct net_device *dev, struct sk_buff *skb)
{
	unsigned int len = skb->len;

	skb->protocol = eth_type_trans(skb, dev);
	if (__netif_rx(skb) == NET_RX_SUCCESS)
		dev_sw_netstats_rx_add(dev, len);
}

/**
 * simnic_port_send() - sends a frame out of a port
 * @port: the port
 * @skb: the frame, which is consumed
 *
 * Context: RCU read side, softirqs disabled.
 * Return: whether it went out.
 */
bool simnic_port_send(struct simnic_port *port, struct sk_buff *skb)
{
	struct net_device *wire = rcu_dereference(port->wire);

	if (!wire || !simnic_port_ready(port)) {
		kfree_skb(skb);
		return false;
	}
	simnic_count(port, wire_tx);
	if (!simnic_fits(wire, skb)) {
		simnic_count(port, oversize);
		dev_core_stats_rx_dropped_inc(wire);
		kfree_skb(skb);
		return true;
	}
	simnic_receive(wire, skb);
	return true;
}

/* A frame that the host sends. */
static netdev_tx_t simnic_port_xmit(struct sk_buff *skb, struct net_device *dev)
{
	struct simnic_port *port = netdev_priv(dev);
	unsigned int len = skb->len;

	skb = simnic_serialize(skb);
	if (!skb) {
		dev_core_stats_tx_dropped_inc(dev);
		return NETDEV_TX_OK;
	}
	rcu_read_lock();
	if (simnic_port_send(port, skb)) {
		simnic_count(port, host_tx);
		dev_sw_netstats_tx_add(dev, 1, len);
	} else {
		dev_core_stats_tx_dropped_inc(dev);
	}
	rcu_read_unlock();
	return NETDEV_TX_OK;
}

/* A frame that comes from the wire. */
static void simnic_port_ingress(struct simnic_port *port, struct sk_buff *skb)
{
	simnic_count(port, wire_rx);
	if (!simnic_fits(port->dev, skb)) {
		simnic_count(port, oversize);
		dev_core_stats_rx_dropped_inc(port->dev);
		kfree_skb(skb);
		return;
	}
	if (simnic_pipeline(port, skb) == SIMNIC_CONSUMED)
		return;
	simnic_count(port, host_rx);
	simnic_receive(port->dev, skb);
}

static netdev_tx_t simnic_wire_xmit(struct sk_buff *skb, struct net_device *dev)
{
	struct simnic_wire *wire = netdev_priv(dev);
	unsigned int len = skb->len;
	struct simnic_port *port;

	skb = simnic_serialize(skb);
	if (!skb) {
		dev_core_stats_tx_dropped_inc(dev);
		return NETDEV_TX_OK;
	}
	rcu_read_lock();
	port = rcu_dereference(wire->port);
	if (port && simnic_port_ready(port)) {
		dev_sw_netstats_tx_add(dev, 1, len);
		simnic_port_ingress(port, skb);
	} else {
		dev_core_stats_tx_dropped_inc(dev);
		kfree_skb(skb);
	}
	rcu_read_unlock();
	return NETDEV_TX_OK;
}

/* The link is up when both ends are and the cable is plugged in. */
static void simnic_link_update(struct simnic_port *port)
{
	struct net_device *wire;
	bool up;

	rcu_read_lock();
	spin_lock_bh(&port->link_lock);
	wire = rcu_dereference(port->wire);
	up = wire && !port->unplugged && netif_running(port->dev) && netif_running(wire);
	if (up) {
		netif_carrier_on(port->dev);
		netif_carrier_on(wire);
	} else {
		netif_carrier_off(port->dev);
		if (wire)
			netif_carrier_off(wire);
	}
	spin_unlock_bh(&port->link_lock);
	rcu_read_unlock();
}

/* Plugs the cable in or pulls it. */
void simnic_link_set(struct simnic_port *port, bool plugged)
{
	spin_lock_bh(&port->link_lock);
	port->unplugged = !plugged;
	spin_unlock_bh(&port->link_lock);
	simnic_link_update(port);
}

static void simnic_link_replug(struct work_struct *work)
{
	simnic_link_set(container_of(to_delayed_work(work), struct simnic_port, replug), true);
}

/* Pulls the cable, and plugs it in again after a time. */
void simnic_link_flap(struct simnic_port *port, unsigned int ms)
{
	simnic_link_set(port, false);
	mod_delayed_work(system_wq, &port->replug, msecs_to_jiffies(ms));
}

static int simnic_port_open(struct net_device *dev)
{
	simnic_link_update(netdev_priv(dev));
	return 0;
}

/* The core clears IFF_UP after this; __LINK_STATE_START is gone already. */
static int simnic_port_stop(struct net_device *dev)
{
	simnic_link_update(netdev_priv(dev));
	return 0;
}

static int simnic_wire_open(struct net_device *dev)
{
	struct simnic_wire *wire = netdev_priv(dev);
	struct simnic_port *port = rtnl_dereference(wire->port);

	if (!port)
		return -ENOTCONN;
	simnic_link_update(port);
	return 0;
}

static int simnic_wire_stop(struct net_device *dev)
{
	struct simnic_wire *wire = netdev_priv(dev);
	struct simnic_port *port = rtnl_dereference(wire->port);

	netif_carrier_off(dev);
	if (port)
		simnic_link_update(port);
	return 0;
}

/* Nobody has a reference to the netdev any more, and so nobody is about to take one to the egress. */
static void simnic_port_free(struct net_device *dev)
{
	struct simnic_port *port = netdev_priv(dev);

	simnic_egress_put(port->egress);
	atomic_dec(&simnic_allocations.ports);
}

static int simnic_port_init(struct net_device *dev)
{
	struct simnic_port *port = netdev_priv(dev);
	int err;

	port->dev = dev;
	port->id = atomic_inc_return(&simnic_next_port) - 1;
	mutex_init(&port->lock);
	spin_lock_init(&port->link_lock);
	INIT_DELAYED_WORK(&port->replug, simnic_link_replug);
	INIT_LIST_HEAD(&port->tc_blocks);
	INIT_LIST_HEAD(&port->ft_blocks);
	INIT_LIST_HEAD(&port->of_nic);

	port->egress = kzalloc(sizeof(*port->egress), GFP_KERNEL);
	if (!port->egress)
		return -ENOMEM;
	refcount_set(&port->egress->refs, 1);
	rcu_assign_pointer(port->egress->port, port);
	err = simnic_table_init(&port->tc, "tc");
	if (err)
		goto err_egress;
	err = simnic_table_init(&port->ft, "ft");
	if (err)
		goto err_tc;
	atomic_inc(&simnic_allocations.egresses);
	atomic_inc(&simnic_allocations.ports);
	dev->priv_destructor = simnic_port_free;
	return 0;

err_tc:
	simnic_table_destroy(port, &port->tc);
err_egress:
	kfree(port->egress);
	return err;
}

/* No frame is on its way through the port any more, and neither TC nor a flowtable bound to it. */
static void simnic_port_uninit(struct net_device *dev)
{
	struct simnic_port *port = netdev_priv(dev);

	simnic_devlink_port_del(port);
	simnic_debugfs_port_del(port);
	cancel_delayed_work_sync(&port->replug);
	simnic_table_destroy(port, &port->tc);
	simnic_table_destroy(port, &port->ft);
	RCU_INIT_POINTER(port->egress->port, NULL);
}

static int simnic_port_set_features(struct net_device *dev, netdev_features_t features)
{
	struct simnic_port *port = netdev_priv(dev);
	bool used;

	if (!(dev->features & NETIF_F_HW_TC) || features & NETIF_F_HW_TC)
		return 0;
	mutex_lock(&port->lock);
	used = !list_empty(&port->tc.rules) || !list_empty(&port->ft.rules);
	mutex_unlock(&port->lock);
	if (!used)
		return 0;
	netdev_err(dev, "there are offloaded rules, hw-tc-offload stays on\n");
	return -EBUSY;
}

static int simnic_port_setup_tc(struct net_device *dev, enum tc_setup_type type, void *type_data)
{
	struct simnic_port *port = netdev_priv(dev);

	switch (type) {
	case TC_SETUP_BLOCK:
		return simnic_setup_tc_block(port, type_data);
	case TC_SETUP_FT:
		return simnic_setup_ft_block(port, type_data);
	default:
		return -EOPNOTSUPP;
	}
}

static int simnic_port_parent_id(struct net_device *dev, struct netdev_phys_item_id *ppid)
{
	ppid->id_len = sizeof(simnic_switch_id);
	memcpy(ppid->id, simnic_switch_id, sizeof(simnic_switch_id));
	return 0;
}

static int simnic_port_phys_name(struct net_device *dev, char *name, size_t len)
{
	struct simnic_port *port = netdev_priv(dev);

	if (snprintf(name, len, "p%u", port->id) >= len)
		return -EINVAL;
	return 0;
}

static struct net_device *simnic_peer(const struct net_device *dev)
{
	struct simnic_port *port;

	if (simnic_is_port(dev)) {
		port = netdev_priv(dev);
		return rcu_dereference_rtnl(port->wire);
	}
	port = rcu_dereference_rtnl(((struct simnic_wire *)netdev_priv(dev))->port);
	return port ? port->dev : NULL;
}

static int simnic_iflink(const struct net_device *dev)
{
	struct net_device *peer;
	int iflink;

	rcu_read_lock();
	peer = simnic_peer(dev);
	iflink = peer ? READ_ONCE(peer->ifindex) : 0;
	rcu_read_unlock();
	return iflink;
}

static const struct net_device_ops simnic_port_ops = {
	.ndo_init		= simnic_port_init,
	.ndo_uninit		= simnic_port_uninit,
	.ndo_open		= simnic_port_open,
	.ndo_stop		= simnic_port_stop,
	.ndo_start_xmit		= simnic_port_xmit,
	.ndo_get_stats64	= dev_get_tstats64,
	.ndo_set_mac_address	= eth_mac_addr,
	.ndo_validate_addr	= eth_validate_addr,
	.ndo_set_features	= simnic_port_set_features,
	.ndo_setup_tc		= simnic_port_setup_tc,
	.ndo_get_port_parent_id	= simnic_port_parent_id,
	.ndo_get_phys_port_name	= simnic_port_phys_name,
	.ndo_get_iflink		= simnic_iflink,
};

static const struct net_device_ops simnic_wire_ops = {
	.ndo_open		= simnic_wire_open,
	.ndo_stop		= simnic_wire_stop,
	.ndo_start_xmit		= simnic_wire_xmit,
	.ndo_get_stats64	= dev_get_tstats64,
	.ndo_set_mac_address	= eth_mac_addr,
	.ndo_validate_addr	= eth_validate_addr,
	.ndo_get_iflink		= simnic_iflink,
};

static void simnic_get_drvinfo(struct net_device *dev, struct ethtool_drvinfo *info)
{
	strscpy(info->driver, SIMNIC_DRV_NAME, sizeof(info->driver));
}

static int simnic_get_link_ksettings(struct net_device *dev, struct ethtool_link_ksettings *cmd)
{
	cmd->base.speed = SPEED_10000;
	cmd->base.duplex = DUPLEX_FULL;
	cmd->base.port = PORT_OTHER;
	cmd->base.autoneg = AUTONEG_DISABLE;
	return 0;
}

static int simnic_get_sset_count(struct net_device *dev, int sset)
{
	return sset == ETH_SS_STATS ? SIMNIC_N_COUNTERS : -EOPNOTSUPP;
}

static void simnic_get_strings(struct net_device *dev, u32 sset, u8 *data)
{
	int i;

	if (sset != ETH_SS_STATS)
		return;
	for (i = 0; i < SIMNIC_N_COUNTERS; i++)
		strscpy(data + i * ETH_GSTRING_LEN, simnic_counter_names[i], ETH_GSTRING_LEN);
}

static void simnic_get_ethtool_stats(struct net_device *dev, struct ethtool_stats *stats, u64 *data)
{
	struct simnic_port *port = netdev_priv(dev);
	int i;

	for (i = 0; i < SIMNIC_N_COUNTERS; i++)
		data[i] = atomic64_read(&port->counters[i]);
}

static const struct ethtool_ops simnic_port_ethtool_ops = {
	.get_drvinfo		= simnic_get_drvinfo,
	.get_link		= ethtool_op_get_link,
	.get_link_ksettings	= simnic_get_link_ksettings,
	.get_sset_count		= simnic_get_sset_count,
	.get_strings		= simnic_get_strings,
	.get_ethtool_stats	= simnic_get_ethtool_stats,
};

static const struct ethtool_ops simnic_wire_ethtool_ops = {
	.get_drvinfo		= simnic_get_drvinfo,
	.get_link		= ethtool_op_get_link,
	.get_link_ksettings	= simnic_get_link_ksettings,
};

/* What both ends have; a new device is a port's unless simnic_newlink() makes it a wire's. */
static void simnic_setup(struct net_device *dev)
{
	BUILD_BUG_ON(sizeof(struct simnic_wire) > sizeof(struct simnic_port));

	ether_setup(dev);
	dev->netdev_ops = &simnic_port_ops;
	dev->ethtool_ops = &simnic_port_ethtool_ops;
	/* No offloads of the transmit path: the stack does that work before a frame gets here. */
	dev->features |= NETIF_F_HW_TC;
	dev->hw_features |= NETIF_F_HW_TC;
	simnic_compat_set_lltx(dev);
	dev->priv_flags &= ~IFF_TX_SKB_SHARING;
	dev->priv_flags |= IFF_LIVE_ADDR_CHANGE | IFF_NO_QUEUE | IFF_DISABLE_NETPOLL;
	dev->pcpu_stat_type = NETDEV_PCPU_STAT_TSTATS;
	dev->needs_free_netdev = true;
	dev->max_mtu = SIMNIC_MAX_MTU;
}

static int simnic_validate(struct nlattr *tb[], struct nlattr *data[],
			   struct netlink_ext_ack *extack)
{
	if (tb[IFLA_ADDRESS]) {
		if (nla_len(tb[IFLA_ADDRESS]) != ETH_ALEN)
			return -EINVAL;
		if (!is_valid_ether_addr(nla_data(tb[IFLA_ADDRESS])))
			return -EADDRNOTAVAIL;
	}
	return 0;
}

static struct rtnl_link_ops simnic_link_ops;

/* The wire's end: named and placed by attribute "peer", as veth's; else after its port. */
static struct net_device *simnic_wire_create(struct net *peer_net, struct net_device *port_dev,
					     struct nlattr *data[], struct netlink_ext_ack *extack)
{
	struct nlattr *tb[IFLA_MAX + 1] = {};
	struct ifinfomsg *ifmp = NULL;
	struct net_device *dev;
	char name[IFNAMSIZ];
	struct net *net;
	int err;

	if (data && data[VETH_INFO_PEER]) {
		ifmp = nla_data(data[VETH_INFO_PEER]);
		err = rtnl_nla_parse_ifinfomsg(tb, data[VETH_INFO_PEER], extack);
		if (err)
			return ERR_PTR(err);
		err = simnic_validate(tb, NULL, extack);
		if (err)
			return ERR_PTR(err);
	}
	if (tb[IFLA_IFNAME])
		nla_strscpy(name, tb[IFLA_IFNAME], IFNAMSIZ);
	else
		snprintf(name, IFNAMSIZ, "%.*sw", IFNAMSIZ - 2, port_dev->name);

	net = simnic_compat_get_peer_net(peer_net, tb);
	if (IS_ERR(net))
		return ERR_CAST(net);
	dev = rtnl_create_link(net, name, tb[IFLA_IFNAME] ? NET_NAME_USER : NET_NAME_ENUM,
			       &simnic_link_ops, tb, extack);
	if (IS_ERR(dev))
		goto out;

	dev->netdev_ops = &simnic_wire_ops;
	dev->ethtool_ops = &simnic_wire_ethtool_ops;
	dev->features &= ~NETIF_F_HW_TC;
	dev->hw_features &= ~NETIF_F_HW_TC;
	if (!tb[IFLA_ADDRESS])
		eth_hw_addr_random(dev);
	if (ifmp && port_dev->ifindex)
		dev->ifindex = ifmp->ifi_index;

	err = register_netdevice(dev);
	if (err) {
		free_netdev(dev);
		dev = ERR_PTR(err);
		goto out;
	}
	netif_carrier_off(dev);
	err = rtnl_configure_link(dev, ifmp, 0, NULL);
	if (err) {
		unregister_netdevice(dev);
		dev = ERR_PTR(err);
	}
out:
	put_net(net);
	return dev;
}

static int simnic_create(struct net *peer_net, struct net_device *dev, struct nlattr *tb[],
			 struct nlattr *data[], struct netlink_ext_ack *extack)
{
	struct simnic_port *port = netdev_priv(dev);
	struct net_device *wire_dev;
	struct simnic_wire *wire;
	int err;

	if (tb[IFLA_IFNAME])
		nla_strscpy(dev->name, tb[IFLA_IFNAME], IFNAMSIZ);
	else
		snprintf(dev->name, IFNAMSIZ, SIMNIC_DRV_NAME "%%d");
	if (!tb[IFLA_ADDRESS])
		eth_hw_addr_random(dev);

	wire_dev = simnic_wire_create(peer_net, dev, data, extack);
	if (IS_ERR(wire_dev))
		return PTR_ERR(wire_dev);
	err = register_netdevice(dev);
	if (err) {
		unregister_netdevice(wire_dev);
		return err;
	}
	netif_carrier_off(dev);

	wire = netdev_priv(wire_dev);
	rcu_assign_pointer(port->wire, wire_dev);
	rcu_assign_pointer(wire->port, port);
	simnic_debugfs_port_add(port);
	simnic_devlink_port_add(port);
	return 0;
}

SIMNIC_COMPAT_NEWLINK(simnic_newlink, simnic_create)

/* Either end takes the other along. The core waits for frames on their way before it goes on. */
static void simnic_dellink(struct net_device *dev, struct list_head *head)
{
	struct net_device *peer = simnic_peer(dev);
	struct net_device *ends[] = { dev, peer };
	struct simnic_wire *wire;
	struct simnic_port *port;
	int i;

	for (i = 0; i < ARRAY_SIZE(ends); i++) {
		if (!ends[i])
			continue;
		if (simnic_is_port(ends[i])) {
			port = netdev_priv(ends[i]);
			RCU_INIT_POINTER(port->wire, NULL);
			RCU_INIT_POINTER(port->egress->port, NULL);
		} else {
			wire = netdev_priv(ends[i]);
			RCU_INIT_POINTER(wire->port, NULL);
		}
		unregister_netdevice_queue(ends[i], head);
	}
}

static struct net *simnic_link_net(const struct net_device *dev)
{
	struct net_device *peer = simnic_peer(dev);

	return dev_net(peer ? peer : dev);
}

static const struct nla_policy simnic_policy[VETH_INFO_MAX + 1] = {
	[VETH_INFO_PEER]	= { .len = sizeof(struct ifinfomsg) },
};

static struct rtnl_link_ops simnic_link_ops = {
	.kind		= SIMNIC_DRV_NAME,
	.priv_size	= sizeof(struct simnic_port),
	.setup		= simnic_setup,
	.validate	= simnic_validate,
	.newlink	= simnic_newlink,
	SIMNIC_COMPAT_PEER_TYPE
	.dellink	= simnic_dellink,
	.policy		= simnic_policy,
	.maxtype	= VETH_INFO_MAX,
	.get_link_net	= simnic_link_net,
};

static int __init simnic_init(void)
{
	int err;

	err = simnic_tables_init();
	if (err)
		return err;
	simnic_debugfs_init();
	err = simnic_devlink_init();
	if (err)
		goto err_debugfs;
	err = rtnl_link_register(&simnic_link_ops);
	if (err)
		goto err_devlink;
	return 0;

err_devlink:
	simnic_devlink_exit();
err_debugfs:
	simnic_debugfs_exit();
	simnic_tables_exit();
	return err;
}

static void __exit simnic_exit(void)
{
	rtnl_link_unregister(&simnic_link_ops);
	simnic_devlink_exit();
	simnic_debugfs_exit();
	simnic_tables_exit();
}

module_init(simnic_init);
module_exit(simnic_exit);

MODULE_DESCRIPTION("Simulated NIC that offloads flows");
MODULE_LICENSE("GPL");
MODULE_ALIAS_RTNL_LINK(SIMNIC_DRV_NAME);
