// SPDX-License-Identifier: GPL-2.0
/*
 * Binding of nf_flowtable, with an identity and a list of its own: beside TC's block on one port the
 * same ones would be busy. One flowtable can be bound to a port at a time.
 *
 * The kernel offers each direction of a connection to every port of the flowtable, again whenever it
 * refreshes it: a port takes those that it is the ingress of, once.
 */
#include "simnic.h"

static int simnic_ft_block_cb(enum tc_setup_type type, void *type_data, void *cb_priv)
{
	struct simnic_port *port = cb_priv;

	if (type != TC_SETUP_CLSFLOWER)
		return -EOPNOTSUPP;
	return simnic_cls(port, &port->ft, type_data);
}

/*
 * Called under the nf_tables commit mutex of the port's network namespace, which guards the list,
 * and the flowtable's own lock, which keeps out the callback.
 */
int simnic_setup_ft_block(struct simnic_port *port, struct flow_block_offload *f)
{
	int err;

	err = flow_block_cb_setup_simple(f, &port->ft_blocks, simnic_ft_block_cb, port, port, true);
	if (err || f->command != FLOW_BLOCK_UNBIND)
		return err;

	/* Nobody deletes what is left: the flowtable ends its entries after it was unbound. */
	mutex_lock(&port->lock);
	simnic_table_flush(port, &port->ft);
	mutex_unlock(&port->lock);
	return 0;
}
