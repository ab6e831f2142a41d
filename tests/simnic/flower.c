// SPDX-License-Identifier: GPL-2.0
/*
 * Rules as the kernel brings, deletes and counts them, and the binding of TC's blocks.
 *
 * TC calls with or without rtnl, several at once; the port's mutex is the queue to the hardware, one
 * command at a time, each as slow as knob "insert_latency_us" says.
 */
#include <linux/delay.h>
#include <net/pkt_cls.h>

#include "simnic.h"

void simnic_refuse(struct netlink_ext_ack *extack, const char *text)
{
	if (extack)
		extack->_msg = text;
}

static const char * const simnic_feature_texts[SIMNIC_N_FEATURES] = {
#define X(id, name, text) [SIMNIC_F_##id] = "simnic: " text " is not supported",
	SIMNIC_FEATURES(X)
#undef X
};

/* Whether the port has a feature, that is: whether knob "unsupported" does not take it away. */
bool simnic_supports(const struct simnic_port *port, enum simnic_feature feature,
		     struct netlink_ext_ack *extack)
{
	if (!(READ_ONCE(port->knobs.unsupported) & BIT(feature)))
		return true;
	simnic_refuse(extack, simnic_feature_texts[feature]);
	return false;
}

/* Whether this call is one that knob "fail_..." lets fail: 0 or the error. */
static int simnic_fault(struct simnic_fault *fault)
{
	if (!fault->after)
		return 0;
	if (fault->after > 1) {
		fault->after--;
		return 0;
	}
	if (fault->count == 1)
		fault->after = 0;
	else if (fault->count)
		fault->count--;
	return -fault->error;
}

static int simnic_cls_replace(struct simnic_port *port, struct simnic_table *table,
			      struct flow_cls_offload *f)
{
	struct netlink_ext_ack *extack = f->common.extack;
	bool ft = table == &port->ft;
	struct simnic_key key, mask;
	struct simnic_rule *rule;
	int err;

	if (!tc_can_offload(port->dev)) {
		NL_SET_ERR_MSG_MOD(extack, "hw-tc-offload is off");
		return -EOPNOTSUPP;
	}
	err = simnic_match_parse(port, ft, f, &key, &mask);
	if (err)
		return err;
	rule = simnic_actions_parse(port, ft, f);
	if (IS_ERR(rule))
		return PTR_ERR(rule);
	rule->cookie = f->cookie;
	rule->key = key;
	rule->chain = f->common.chain_index;
	rule->prio = ft ? 0 : f->common.prio;

	mutex_lock(&port->lock);
	if (port->knobs.insert_latency_us)
		fsleep(port->knobs.insert_latency_us);
	/* No text: without one tc(8) shows the errno. */
	err = simnic_fault(&port->knobs.fail_insert);
	if (err)
		goto out;
	rule->lastused = jiffies;
	rule->stats.lastused = jiffies;
	rule->stats.read_at = jiffies;
	rule->discard = port->knobs.silent == 2;
	if (port->knobs.silent == 1)
		rule->state = SIMNIC_RULE_SILENT;
	err = simnic_table_add(port, table, rule, &mask);
	if (err == -ENOSPC)
		NL_SET_ERR_MSG_MOD(extack, "the flow table is full");
out:
	mutex_unlock(&port->lock);
	if (err)
		simnic_rule_free(rule);
	return err;
}

static int simnic_cls_destroy(struct simnic_port *port, struct simnic_table *table,
			      struct flow_cls_offload *f)
{
	struct simnic_rule *rule;
	int err = 0;

	mutex_lock(&port->lock);
	rule = simnic_table_find(table, f->cookie);
	if (!rule) {
		err = -ENOENT;
		goto out;
	}
	err = simnic_fault(&port->knobs.fail_delete);
	if (err && rule->state == SIMNIC_RULE_ACTIVE)
		simnic_table_orphan(table, rule);
	else
		simnic_table_del(port, table, rule);
out:
	mutex_unlock(&port->lock);
	return err;
}

/* Reads the counters of the hardware: at once, or not more often than the knob says. */
static void simnic_stats_read(struct simnic_port *port, struct simnic_rule *rule)
{
	unsigned long interval = msecs_to_jiffies(port->knobs.stats_interval_ms);

	if (port->knobs.stats_frozen ||
	    (interval && time_before(jiffies, rule->stats.read_at + interval)))
		return;
	rule->stats.packets = atomic64_read(&rule->packets);
	rule->stats.bytes = atomic64_read(&rule->bytes);
	rule->stats.lastused = READ_ONCE(rule->lastused);
	rule->stats.read_at = jiffies;
}

static int simnic_cls_stats(struct simnic_port *port, struct simnic_table *table,
			    struct flow_cls_offload *f)
{
	struct simnic_rule *rule;
	int err;

	mutex_lock(&port->lock);
	rule = simnic_table_find(table, f->cookie);
	if (!rule) {
		err = -ENOENT;
		goto out;
	}
	err = simnic_fault(&port->knobs.fail_stats);
	if (err)
		goto out;
	simnic_stats_read(port, rule);
	flow_stats_update(&f->stats, rule->stats.bytes - rule->stats.told_bytes,
			  rule->stats.packets - rule->stats.told_packets, 0,
			  rule->stats.lastused, rule->hw_stats);
	rule->stats.told_packets = rule->stats.packets;
	rule->stats.told_bytes = rule->stats.bytes;
out:
	mutex_unlock(&port->lock);
	return err;
}

/**
 * simnic_cls() - a command for a rule
 * @port: whose rule it is
 * @table: TC's or the flowtable's
 * @f: the command
 *
 * Context: may sleep.
 * Return: 0, -EOPNOTSUPP for what this NIC cannot do, -ENOSPC when it is full, -EEXIST and -ENOENT
 * for a cookie that it knows or does not, -ENOMEM, and what the knobs let fail.
 */
int simnic_cls(struct simnic_port *port, struct simnic_table *table, struct flow_cls_offload *f)
{
	switch (f->command) {
	case FLOW_CLS_REPLACE:
		return simnic_cls_replace(port, table, f);
	case FLOW_CLS_DESTROY:
		return simnic_cls_destroy(port, table, f);
	case FLOW_CLS_STATS:
		return simnic_cls_stats(port, table, f);
	default:
		return -EOPNOTSUPP;
	}
}

static int simnic_tc_block_cb(enum tc_setup_type type, void *type_data, void *cb_priv)
{
	struct simnic_port *port = cb_priv;

	if (type != TC_SETUP_CLSFLOWER)
		return -EOPNOTSUPP;
	return simnic_cls(port, &port->tc, type_data);
}

/* Called under rtnl. */
int simnic_setup_tc_block(struct simnic_port *port, struct flow_block_offload *f)
{
	f->unlocked_driver_cb = true;
	return flow_block_cb_setup_simple(f, &port->tc_blocks, simnic_tc_block_cb, port, port, true);
}
