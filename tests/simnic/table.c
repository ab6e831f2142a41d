// SPDX-License-Identifier: GPL-2.0
/*
 * A flow table: the driver's book of rules by cookie, and the hardware's view of them, groups by
 * chain, prio and mask that a frame walks. All changes under the port's mutex, lookups under RCU.
 */
#include <linux/slab.h>
#include <linux/workqueue.h>

#include "simnic.h"

struct simnic_allocations simnic_allocations;

static struct workqueue_struct *simnic_free_wq;

static const struct rhashtable_params simnic_cookie_params = {
	.head_offset		= offsetof(struct simnic_rule, cookie_node),
	.key_offset		= offsetof(struct simnic_rule, cookie),
	.key_len		= sizeof_field(struct simnic_rule, cookie),
	.automatic_shrinking	= true,
};

static const struct rhashtable_params simnic_key_params = {
	.head_offset		= offsetof(struct simnic_rule, key_node),
	.key_offset		= offsetof(struct simnic_rule, key),
	.key_len		= sizeof(struct simnic_key),
	.automatic_shrinking	= true,
};

static void simnic_key_and(struct simnic_key *out, const struct simnic_key *key,
			   const struct simnic_key *mask)
{
	const u64 *k = (const u64 *)key, *m = (const u64 *)mask;
	u64 *o = (u64 *)out;
	int i;

	BUILD_BUG_ON(sizeof(*key) != 72); /* no padding, and whole words */
	for (i = 0; i < sizeof(*key) / sizeof(u64); i++)
		o[i] = k[i] & m[i];
}

struct simnic_rule *simnic_rule_alloc(unsigned int n_acts)
{
	struct simnic_rule *rule;

	rule = kzalloc(struct_size(rule, acts, n_acts), GFP_KERNEL);
	if (rule)
		atomic_inc(&simnic_allocations.rules);
	return rule;
}

void simnic_rule_free(struct simnic_rule *rule)
{
	int i;

	for (i = 0; i < rule->n_acts; i++) {
		if (rule->acts[i].id == SIMNIC_ACT_REDIRECT)
			simnic_egress_put(rule->acts[i].egress);
	}
	kfree(rule);
	atomic_dec(&simnic_allocations.rules);
}

static void simnic_rule_free_rcu(struct rcu_head *rcu)
{
	simnic_rule_free(container_of(rcu, struct simnic_rule, rcu));
}

static void simnic_group_free(struct simnic_group *group)
{
	rhltable_destroy(&group->rules);
	kfree(group);
	atomic_dec(&simnic_allocations.groups);
}

static void simnic_group_free_work(struct work_struct *work)
{
	simnic_group_free(container_of(to_rcu_work(work), struct simnic_group, free_work));
}

static struct simnic_group *simnic_group_get(struct simnic_table *table, u32 chain, u32 prio,
					     const struct simnic_key *mask)
{
	struct list_head *after = &table->groups;
	struct simnic_group *group;
	int err;

	list_for_each_entry(group, &table->groups, list) {
		if (group->chain > chain || (group->chain == chain && group->prio > prio))
			break;
		after = &group->list;
		if (group->chain == chain && group->prio == prio &&
		    !memcmp(&group->mask, mask, sizeof(*mask)))
			return group;
	}

	group = kzalloc(sizeof(*group), GFP_KERNEL);
	if (!group)
		return ERR_PTR(-ENOMEM);
	group->chain = chain;
	group->prio = prio;
	group->mask = *mask;
	err = rhltable_init(&group->rules, &simnic_key_params);
	if (err) {
		kfree(group);
		return ERR_PTR(err);
	}
	INIT_RCU_WORK(&group->free_work, simnic_group_free_work);
	atomic_inc(&simnic_allocations.groups);
	list_add_rcu(&group->list, after);
	return group;
}

static void simnic_group_put(struct simnic_group *group)
{
	if (group->n_rules)
		return;
	list_del_rcu(&group->list);
	queue_rcu_work(simnic_free_wq, &group->free_work);
}

/* Takes a rule out of the hardware; the driver's book still has it. */
static void simnic_rule_unlink(struct simnic_port *port, struct simnic_rule *rule)
{
	struct simnic_group *group = rule->group;

	if (group) {
		rhltable_remove(&group->rules, &rule->key_node, simnic_key_params);
		group->n_rules--;
		simnic_group_put(group);
		rule->group = NULL;
	}
	if (rule->state != SIMNIC_RULE_LOST)
		port->occupied--;
}

/**
 * simnic_table_find() - the rule that the kernel means by a cookie
 * @table: the table
 * @cookie: the kernel's name of the rule
 *
 * Context: the port's mutex is held.
 * Return: the rule, or NULL.
 */
struct simnic_rule *simnic_table_find(struct simnic_table *table, unsigned long cookie)
{
	return rhashtable_lookup_fast(&table->by_cookie, &cookie, simnic_cookie_params);
}

/**
 * simnic_table_add() - into the driver's book and the hardware
 * @port: whose table it is
 * @table: the table
 * @rule: with its cookie, key, chain and prio; the table's own on success
 * @mask: the mask of its key
 *
 * Context: the port's mutex is held.
 * Return: 0, -EEXIST for a known cookie, -ENOSPC when the hardware is full, -ENOMEM.
 */
int simnic_table_add(struct simnic_port *port, struct simnic_table *table,
		     struct simnic_rule *rule, const struct simnic_key *mask)
{
	struct simnic_group *group;
	int err;

	if (port->knobs.capacity && port->occupied >= port->knobs.capacity)
		return -ENOSPC;

	simnic_key_and(&rule->key, &rule->key, mask);
	err = rhashtable_lookup_insert_fast(&table->by_cookie, &rule->cookie_node,
					    simnic_cookie_params);
	if (err)
		return err;

	if (rule->state != SIMNIC_RULE_SILENT) {
		group = simnic_group_get(table, rule->chain, rule->prio, mask);
		if (IS_ERR(group)) {
			err = PTR_ERR(group);
			goto err_cookie;
		}
		/* Of equal keys the newest is found: a filter that replaces another comes first. */
		err = rhltable_insert(&group->rules, &rule->key_node, simnic_key_params);
		if (err) {
			simnic_group_put(group);
			goto err_cookie;
		}
		group->n_rules++;
		rule->group = group;
		rule->state = SIMNIC_RULE_ACTIVE;
	}
	port->occupied++;
	list_add_tail(&rule->list, &table->rules);
	return 0;

err_cookie:
	rhashtable_remove_fast(&table->by_cookie, &rule->cookie_node, simnic_cookie_params);
	return err;
}

/**
 * simnic_table_del() - out of the hardware and the driver's book
 * @port: whose table it is
 * @table: the table
 * @rule: the rule, which is freed when no frame looks at it any more
 *
 * Context: the port's mutex is held.
 */
void simnic_table_del(struct simnic_port *port, struct simnic_table *table,
		      struct simnic_rule *rule)
{
	if (rule->state != SIMNIC_RULE_ORPHAN)
		rhashtable_remove_fast(&table->by_cookie, &rule->cookie_node,
				       simnic_cookie_params);
	simnic_rule_unlink(port, rule);
	list_del(&rule->list);
	call_rcu(&rule->rcu, simnic_rule_free_rcu);
}

/**
 * simnic_table_orphan() - out of the driver's book only: the hardware did not delete it
 * @table: the table
 * @rule: the rule, which goes on acting until a reset
 *
 * Context: the port's mutex is held.
 */
void simnic_table_orphan(struct simnic_table *table, struct simnic_rule *rule)
{
	rhashtable_remove_fast(&table->by_cookie, &rule->cookie_node, simnic_cookie_params);
	rule->state = SIMNIC_RULE_ORPHAN;
}

/* Deletes every rule. */
void simnic_table_flush(struct simnic_port *port, struct simnic_table *table)
{
	struct simnic_rule *rule, *next;

	list_for_each_entry_safe(rule, next, &table->rules, list)
		simnic_table_del(port, table, rule);
}

static void simnic_table_reset(struct simnic_port *port, struct simnic_table *table)
{
	struct simnic_rule *rule, *next;

	list_for_each_entry_safe(rule, next, &table->rules, list) {
		if (rule->state == SIMNIC_RULE_ORPHAN) {
			simnic_table_del(port, table, rule);
			continue;
		}
		simnic_rule_unlink(port, rule);
		rule->state = SIMNIC_RULE_LOST;
	}
}

/* The hardware loses all rules of the port, as when its firmware is loaded anew; nobody is told. */
void simnic_port_reset(struct simnic_port *port)
{
	mutex_lock(&port->lock);
	simnic_table_reset(port, &port->tc);
	simnic_table_reset(port, &port->ft);
	WARN_ON_ONCE(port->occupied);
	mutex_unlock(&port->lock);
}

/**
 * simnic_table_lookup() - the rule for a frame
 * @table: the table
 * @chain: where to look
 * @key: the frame
 *
 * Context: RCU read side.
 * Return: the rule, or NULL.
 */
struct simnic_rule *simnic_table_lookup(const struct simnic_table *table, u32 chain,
					const struct simnic_key *key)
{
	struct simnic_group *group;
	struct rhlist_head *found;
	struct simnic_key masked;

	list_for_each_entry_rcu(group, &table->groups, list) {
		if (group->chain != chain)
			continue;
		simnic_key_and(&masked, key, &group->mask);
		found = rhltable_lookup(&group->rules, &masked, simnic_key_params);
		if (found)
			return container_of(found, struct simnic_rule, key_node);
	}
	return NULL;
}

int simnic_table_init(struct simnic_table *table, const char *name)
{
	table->name = name;
	INIT_LIST_HEAD(&table->groups);
	INIT_LIST_HEAD(&table->rules);
	return rhashtable_init(&table->by_cookie, &simnic_cookie_params);
}

void simnic_table_destroy(struct simnic_port *port, struct simnic_table *table)
{
	mutex_lock(&port->lock);
	simnic_table_flush(port, table);
	mutex_unlock(&port->lock);
	rhashtable_destroy(&table->by_cookie);
}

int simnic_tables_init(void)
{
	simnic_free_wq = alloc_workqueue("simnic_free", WQ_UNBOUND, 0);
	return simnic_free_wq ? 0 : -ENOMEM;
}

void simnic_tables_exit(void)
{
	/* First the callbacks that free rules or queue work, then that work. */
	rcu_barrier();
	destroy_workqueue(simnic_free_wq);
	rcu_barrier();
}
