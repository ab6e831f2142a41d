// SPDX-License-Identifier: GPL-2.0
/*
 * One devlink instance for all ports, since they are one NIC:
 *
 *   devlink dev reload platform/simnic action fw_activate
 *
 * does what firmware does that is loaded anew: the links go down, the hardware forgets all rules, the
 * links come up. TC and the flowtables are not told, and the netdevs stay.
 */
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/platform_device.h>
#include <net/devlink.h>

#include "compat.h"
#include "simnic.h"

static struct platform_device *simnic_device;
static struct devlink *simnic_dl;
/* The ports, and the lock of that list: nothing takes rtnl inside it. */
static LIST_HEAD(simnic_ports);
static DEFINE_MUTEX(simnic_ports_lock);

void simnic_devlink_port_add(struct simnic_port *port)
{
	mutex_lock(&simnic_ports_lock);
	list_add_tail(&port->of_nic, &simnic_ports);
	mutex_unlock(&simnic_ports_lock);
}

void simnic_devlink_port_del(struct simnic_port *port)
{
	mutex_lock(&simnic_ports_lock);
	list_del_init(&port->of_nic);
	mutex_unlock(&simnic_ports_lock);
}

static int simnic_reload_down(struct devlink *dl, bool netns_change,
			      enum devlink_reload_action action,
			      enum devlink_reload_limit limit, struct netlink_ext_ack *extack)
{
	struct simnic_port *port;

	mutex_lock(&simnic_ports_lock);
	list_for_each_entry(port, &simnic_ports, of_nic)
		simnic_link_set(port, false);
	list_for_each_entry(port, &simnic_ports, of_nic)
		simnic_port_reset(port);
	mutex_unlock(&simnic_ports_lock);
	return 0;
}

static int simnic_reload_up(struct devlink *dl, enum devlink_reload_action action,
			    enum devlink_reload_limit limit, u32 *actions_performed,
			    struct netlink_ext_ack *extack)
{
	struct simnic_port *port;

	mutex_lock(&simnic_ports_lock);
	list_for_each_entry(port, &simnic_ports, of_nic)
		simnic_link_set(port, true);
	mutex_unlock(&simnic_ports_lock);
	*actions_performed = BIT(DEVLINK_RELOAD_ACTION_FW_ACTIVATE);
	return 0;
}

static const struct devlink_ops simnic_devlink_ops = {
	.reload_actions	= BIT(DEVLINK_RELOAD_ACTION_FW_ACTIVATE),
	.reload_down	= simnic_reload_down,
	.reload_up	= simnic_reload_up,
};

int simnic_devlink_init(void)
{
	simnic_device = platform_device_register_simple(SIMNIC_DRV_NAME, PLATFORM_DEVID_NONE,
							NULL, 0);
	if (IS_ERR(simnic_device))
		return PTR_ERR(simnic_device);
	simnic_dl = devlink_alloc(&simnic_devlink_ops, 0, &simnic_device->dev);
	if (!simnic_dl) {
		platform_device_unregister(simnic_device);
		return -ENOMEM;
	}
	simnic_compat_devlink_reload(simnic_dl);
	devlink_register(simnic_dl);
	return 0;
}

void simnic_devlink_exit(void)
{
	devlink_unregister(simnic_dl);
	devlink_free(simnic_dl);
	platform_device_unregister(simnic_device);
}
