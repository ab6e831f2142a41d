// SPDX-License-Identifier: GPL-2.0
/*
 * Knobs and counts, in /sys/kernel/debug/simnic/pN for port N, which is the port's phys_port_name:
 *
 *   netdev             (read) the name and ifindex of the host's end
 *   capacity           how many rules fit, beyond which ENOSPC; 0: any number
 *   insert_latency_us  how long an insert takes; others wait for it
 *   fail_insert, fail_delete, fail_stats
 *                      "N ERRNO [COUNT]": from now on the N-th call fails with that errno, and the
 *                      COUNT - 1 ones after it (1 if not given; 0: all of them); "0": none. A rule
 *                      whose delete failed goes on acting, and takes room, until a reset
 *   unsupported        names of what is refused with EOPNOTSUPP, separated by spaces; read for what
 *                      is, and "unsupported_names" for all
 *   stats_frozen       1: counters told to the kernel stand still; 0: they catch up
 *   stats_interval_ms  how often counters are read from the hardware at most; 0: whenever the
 *                      kernel asks
 *   silent             rules added from now on are accepted and do nothing. 1: they match no frame,
 *                      which so goes to the host; 2: they match, count, and lose the frame; 0: off
 *   reset              (write) the hardware forgets all rules, which nobody is told
 *   link               0: the cable is pulled; 1: it is plugged in
 *   link_flap_ms       (write) the cable is pulled and plugged in again after that time
 *   counters           (read) what SIMNIC_COUNTERS in simnic.h lists, and `occupied`: the entries
 *                      of the hardware's table
 *   rules              (read) the rules: table (tc, ft), chain, prio, state (active, silent, orphan,
 *                      lost), packets, bytes
 *
 * and in /sys/kernel/debug/simnic:
 *
 *   allocations        (read) how many ports, egresses (what rules hold of ports), rules and groups
 *                      (of rules with one mask) are allocated
 */
#include <linux/debugfs.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "simnic.h"

static struct dentry *simnic_debugfs;

const char * const simnic_counter_names[SIMNIC_N_COUNTERS] = {
#define X(name) [SIMNIC_COUNTER_##name] = #name,
	SIMNIC_COUNTERS(X)
#undef X
};

static const char * const simnic_feature_names[SIMNIC_N_FEATURES] = {
#define X(id, name, text) [SIMNIC_F_##id] = name,
	SIMNIC_FEATURES(X)
#undef X
};

static const char * const simnic_state_names[] = {
	[SIMNIC_RULE_NEW]	= "new",
	[SIMNIC_RULE_ACTIVE]	= "active",
	[SIMNIC_RULE_SILENT]	= "silent",
	[SIMNIC_RULE_ORPHAN]	= "orphan",
	[SIMNIC_RULE_LOST]	= "lost",
};

#define SIMNIC_LINE	512

/* A line written to a knob, without the white space around it. */
static char *simnic_knob_line(char *line, const char __user *from, size_t count)
{
	if (count >= SIMNIC_LINE)
		return ERR_PTR(-E2BIG);
	if (copy_from_user(line, from, count))
		return ERR_PTR(-EFAULT);
	line[count] = '\0';
	return strim(line);
}

/* fops of a knob with NAME_show() and NAME_write(). */
#define SIMNIC_KNOB(name)						\
static int name##_open(struct inode *inode, struct file *file)		\
{									\
	return single_open(file, name##_show, inode->i_private);	\
}									\
									\
static const struct file_operations name##_fops = {			\
	.owner		= THIS_MODULE,					\
	.open		= name##_open,					\
	.read		= seq_read,					\
	.write		= name##_write,					\
	.llseek		= seq_lseek,					\
	.release	= single_release,				\
}

static int netdev_show(struct seq_file *s, void *unused)
{
	struct simnic_port *port = s->private;

	seq_printf(s, "%s %d\n", port->dev->name, port->dev->ifindex);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(netdev);

static void simnic_fault_show(struct seq_file *s, const struct simnic_fault *fault)
{
	struct simnic_port *port = s->private;

	mutex_lock(&port->lock);
	if (fault->after)
		seq_printf(s, "%u %d %u\n", fault->after, fault->error, fault->count);
	else
		seq_puts(s, "0\n");
	mutex_unlock(&port->lock);
}

static ssize_t simnic_fault_write(struct file *file, struct simnic_fault *fault,
				  const char __user *from, size_t count)
{
	struct simnic_port *port = file_inode(file)->i_private;
	struct simnic_fault new = { .count = 1 };
	char buf[SIMNIC_LINE], *line;
	int n;

	line = simnic_knob_line(buf, from, count);
	if (IS_ERR(line))
		return PTR_ERR(line);
	n = sscanf(line, "%u %d %u", &new.after, &new.error, &new.count);
	if (n < 1 || (new.after && (n < 2 || new.error <= 0 || new.error > MAX_ERRNO)))
		return -EINVAL;
	mutex_lock(&port->lock);
	*fault = new;
	mutex_unlock(&port->lock);
	return count;
}

#define SIMNIC_FAULT_KNOB(name)						\
static int name##_show(struct seq_file *s, void *unused)		\
{									\
	simnic_fault_show(s, &((struct simnic_port *)s->private)->knobs.name); \
	return 0;							\
}									\
									\
static ssize_t name##_write(struct file *file, const char __user *from,	\
			    size_t count, loff_t *pos)			\
{									\
	struct simnic_port *port = file_inode(file)->i_private;		\
									\
	return simnic_fault_write(file, &port->knobs.name, from, count);	\
}									\
									\
SIMNIC_KNOB(name)

SIMNIC_FAULT_KNOB(fail_insert);
SIMNIC_FAULT_KNOB(fail_delete);
SIMNIC_FAULT_KNOB(fail_stats);

static int unsupported_show(struct seq_file *s, void *unused)
{
	struct simnic_port *port = s->private;
	unsigned long set = READ_ONCE(port->knobs.unsupported);
	const char *between = "";
	int i;

	for_each_set_bit(i, &set, SIMNIC_N_FEATURES) {
		seq_printf(s, "%s%s", between, simnic_feature_names[i]);
		between = " ";
	}
	seq_putc(s, '\n');
	return 0;
}

static ssize_t unsupported_write(struct file *file, const char __user *from, size_t count,
				 loff_t *pos)
{
	struct simnic_port *port = file_inode(file)->i_private;
	char buf[SIMNIC_LINE], *line, *word;
	unsigned long set = 0;
	int i;

	BUILD_BUG_ON(SIMNIC_N_FEATURES > BITS_PER_LONG);
	line = simnic_knob_line(buf, from, count);
	if (IS_ERR(line))
		return PTR_ERR(line);
	while ((word = strsep(&line, " ")) != NULL) {
		if (!*word)
			continue;
		i = match_string(simnic_feature_names, SIMNIC_N_FEATURES, word);
		if (i < 0)
			return -EINVAL;
		set |= BIT(i);
	}
	WRITE_ONCE(port->knobs.unsupported, set);
	return count;
}

SIMNIC_KNOB(unsupported);

static int unsupported_names_show(struct seq_file *s, void *unused)
{
	int i;

	for (i = 0; i < SIMNIC_N_FEATURES; i++)
		seq_printf(s, "%s\n", simnic_feature_names[i]);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(unsupported_names);

static int silent_get(void *data, u64 *val)
{
	*val = ((struct simnic_port *)data)->knobs.silent;
	return 0;
}

static int silent_set(void *data, u64 val)
{
	struct simnic_port *port = data;

	if (val > 2)
		return -EINVAL;
	mutex_lock(&port->lock);
	port->knobs.silent = val;
	mutex_unlock(&port->lock);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(silent_fops, silent_get, silent_set, "%llu\n");

static int reset_set(void *data, u64 val)
{
	simnic_port_reset(data);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(reset_fops, NULL, reset_set, "%llu\n");

static int link_get(void *data, u64 *val)
{
	*val = !((struct simnic_port *)data)->unplugged;
	return 0;
}

static int link_set(void *data, u64 val)
{
	simnic_link_set(data, val);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(link_fops, link_get, link_set, "%llu\n");

static int link_flap_set(void *data, u64 val)
{
	if (val > UINT_MAX)
		return -EINVAL;
	simnic_link_flap(data, val);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(link_flap_fops, NULL, link_flap_set, "%llu\n");

static int counters_show(struct seq_file *s, void *unused)
{
	struct simnic_port *port = s->private;
	int i;

	for (i = 0; i < SIMNIC_N_COUNTERS; i++)
		seq_printf(s, "%s %lld\n", simnic_counter_names[i],
			   atomic64_read(&port->counters[i]));
	seq_printf(s, "occupied %u\n", READ_ONCE(port->occupied));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(counters);

static void simnic_rules_show_table(struct seq_file *s, const struct simnic_table *table)
{
	const struct simnic_rule *rule;

	list_for_each_entry(rule, &table->rules, list)
		seq_printf(s, "%s chain %u prio %u %s packets %lld bytes %lld\n",
			   table->name, rule->chain, rule->prio,
			   simnic_state_names[rule->state],
			   atomic64_read(&rule->packets), atomic64_read(&rule->bytes));
}

static int rules_show(struct seq_file *s, void *unused)
{
	struct simnic_port *port = s->private;

	mutex_lock(&port->lock);
	simnic_rules_show_table(s, &port->tc);
	simnic_rules_show_table(s, &port->ft);
	mutex_unlock(&port->lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(rules);

static int allocations_show(struct seq_file *s, void *unused)
{
	seq_printf(s, "ports %d\negresses %d\nrules %d\ngroups %d\n",
		   atomic_read(&simnic_allocations.ports),
		   atomic_read(&simnic_allocations.egresses),
		   atomic_read(&simnic_allocations.rules),
		   atomic_read(&simnic_allocations.groups));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(allocations);

void simnic_debugfs_port_add(struct simnic_port *port)
{
	struct simnic_knobs *knobs = &port->knobs;
	struct dentry *dir;
	char name[16];

	snprintf(name, sizeof(name), "p%u", port->id);
	dir = debugfs_create_dir(name, simnic_debugfs);
	port->debugfs = dir;

	debugfs_create_file("netdev", 0400, dir, port, &netdev_fops);
	debugfs_create_u32("capacity", 0600, dir, &knobs->capacity);
	debugfs_create_u32("insert_latency_us", 0600, dir, &knobs->insert_latency_us);
	debugfs_create_file("fail_insert", 0600, dir, port, &fail_insert_fops);
	debugfs_create_file("fail_delete", 0600, dir, port, &fail_delete_fops);
	debugfs_create_file("fail_stats", 0600, dir, port, &fail_stats_fops);
	debugfs_create_file("unsupported", 0600, dir, port, &unsupported_fops);
	debugfs_create_file("unsupported_names", 0400, dir, port, &unsupported_names_fops);
	debugfs_create_bool("stats_frozen", 0600, dir, &knobs->stats_frozen);
	debugfs_create_u32("stats_interval_ms", 0600, dir, &knobs->stats_interval_ms);
	debugfs_create_file_unsafe("silent", 0600, dir, port, &silent_fops);
	debugfs_create_file_unsafe("reset", 0200, dir, port, &reset_fops);
	debugfs_create_file_unsafe("link", 0600, dir, port, &link_fops);
	debugfs_create_file_unsafe("link_flap_ms", 0200, dir, port, &link_flap_fops);
	debugfs_create_file("counters", 0400, dir, port, &counters_fops);
	debugfs_create_file("rules", 0400, dir, port, &rules_fops);
}

/* Waits for whoever is reading or writing: nothing in this file may wait for rtnl. */
void simnic_debugfs_port_del(struct simnic_port *port)
{
	debugfs_remove_recursive(port->debugfs);
	port->debugfs = NULL;
}

void simnic_debugfs_init(void)
{
	simnic_debugfs = debugfs_create_dir(SIMNIC_DRV_NAME, NULL);
	debugfs_create_file("allocations", 0400, simnic_debugfs, NULL, &allocations_fops);
}

void simnic_debugfs_exit(void)
{
	debugfs_remove_recursive(simnic_debugfs);
}
