/* SPDX-License-Identifier: Apache-2.0
 *
 * Half of the operations are completed when they are submitted, and half by a
 * thread of the NIC's, later. */

#include "nic.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "check.h"

#define BUCKETS 4096

struct rule {
    struct rule *next;
    struct nic_rule what;
    uint8_t cookie[16];
    uint64_t name;
    uint64_t packets;
    unsigned replies;
};

struct nic_port {
    struct nic *nic;
    struct nic_port *next;
    uint32_t id;
    atomic_bool released;
    struct rule *buckets[BUCKETS];
    struct nic_counts counts;
};

struct later {
    struct later *next;
    struct nic_port *port;
    struct ctoffload_op *op;
};

struct nic {
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_t thread;
    bool stop;
    struct later *first, **last;
    struct nic_port *ports;
    struct nic_faults faults;
    struct nic_counts gone;     /* Of ports that were released. */
    uint64_t next_name;
    unsigned turn;
    atomic_uint inits;
    atomic_uint zone;           /* 'faults.zone', for those who take no lock. */
};

static struct rule **
find(struct nic_port *port, const uint8_t cookie[16])
{
    uint32_t hash = cookie[15] | (uint32_t) cookie[14] << 8
                    | (uint32_t) cookie[3] << 11;
    struct rule **rule = &port->buckets[hash % BUCKETS];

    while (*rule && memcmp((*rule)->cookie, cookie, 16)) {
        rule = &(*rule)->next;
    }
    return rule;
}

static void
remove_rule(struct nic_port *port, struct rule **at)
{
    struct rule *rule = *at;

    *at = rule->next;
    port->counts.rules--;
    free(rule);
}

/* Carries out one operation, under the lock.  Returns 0, or why not. */
static int
carry_out(struct nic_port *port, struct ctoffload_op *op, uint64_t *name)
{
    struct rule **at = find(port, op->cookie);
    const struct nic_faults *faults = &port->nic->faults;

    CHECK(!atomic_load(&port->released));
    switch (op->kind) {
    case CTOFFLOAD_OP_ADD:
        CHECK(!*at);            /* No cookie is there twice. */
        CHECK(op->flow && op->flow->size >= sizeof *op->flow);
        CHECK(op->flow->kind == CTOFFLOAD_FORWARD
              || op->flow->kind == CTOFFLOAD_TRACK);
        port->counts.adds++;
        if (faults->busy_every && port->counts.adds % faults->busy_every == 0) {
            port->counts.refused++;
            return -EAGAIN;
        }
        if (faults->refuse_every
            && port->counts.adds % faults->refuse_every == 0) {
            port->counts.refused++;
            return -EIO;
        }
        if (faults->capacity && port->counts.rules >= faults->capacity) {
            port->counts.refused++;
            return CTOFFLOAD_TABLE_FULL;
        }
        *at = calloc(1, sizeof **at);
        CHECK(*at);
        (*at)->what = (struct nic_rule) {
            .port = port->id, .index = NIC_INDEX(op->flow),
            .epoch = op->epoch, .direction = op->flow->direction,
        };
        memcpy((*at)->cookie, op->cookie, 16);
        (*at)->name = *name = ++port->nic->next_name;
        port->counts.rules++;
        return 0;

    case CTOFFLOAD_OP_DELETE:
        port->counts.deletes++;
        CHECK(*at && (*at)->name == op->rule);
        remove_rule(port, at);
        return 0;

    case CTOFFLOAD_OP_ESTABLISHED:
        port->counts.replies++;
        CHECK(*at && (*at)->name == op->rule);
        CHECK_IS((*at)->replies++, 0);  /* At most once for each. */
        return 0;
    }
    CHECK(!"an operation that there is not");
    return -EINVAL;
}

/* Tells the engine, without the lock. */
static void
tell(struct ctoffload_op *op, int why, uint64_t name)
{
    if (why) {
        ctoffload_op_refuse(op, why, "on demand");
    } else {
        ctoffload_op_done(op, name, 1);
    }
}

static void *
run(void *nic_)
{
    struct nic *nic = nic_;

    pthread_mutex_lock(&nic->mutex);
    for (;;) {
        struct later *later = nic->first;

        if (later) {
            uint64_t name = 0;
            int why = carry_out(later->port, later->op, &name);

            nic->first = later->next;
            if (!nic->first) {
                nic->last = &nic->first;
            }
            pthread_mutex_unlock(&nic->mutex);
            tell(later->op, why, name);
            free(later);
            pthread_mutex_lock(&nic->mutex);
        } else if (nic->stop) {
            break;
        } else {
            pthread_cond_wait(&nic->wake, &nic->mutex);
        }
    }
    pthread_mutex_unlock(&nic->mutex);
    return NULL;
}

static int
nic_init(void *nic_)
{
    struct nic *nic = nic_;

    CHECK_IS(atomic_fetch_add(&nic->inits, 1), 0);
    return 0;
}

static void
nic_deinit(void *nic_)
{
    struct nic *nic = nic_;

    CHECK_IS(atomic_fetch_sub(&nic->inits, 1), 1);
    pthread_mutex_lock(&nic->mutex);    /* Threads of the library have released the ports. */
    CHECK(!nic->ports);
    pthread_mutex_unlock(&nic->mutex);
}

static int
nic_bind(void *nic_, const struct ctoffload_netdev *netdev, void **provider)
{
    struct nic *nic = nic_;
    struct nic_port *port;

    CHECK(netdev->size >= sizeof *netdev && netdev->name);
    if (!strncmp(netdev->name, "foreign", 7)) {
        ctoffload_say("not one of this NIC's");
        return -EOPNOTSUPP;
    }
    port = calloc(1, sizeof *port);
    CHECK(port);
    port->nic = nic;
    port->id = netdev->id;
    pthread_mutex_lock(&nic->mutex);
    port->next = nic->ports;
    nic->ports = port;
    nic->gone.bound++;
    pthread_mutex_unlock(&nic->mutex);
    HAPPENS_BEFORE(port);
    *provider = port;
    return 0;
}

static int
nic_can_offload(void *port_, const struct ctoffload_flow *flow)
{
    struct nic_port *port = port_;
    unsigned zone;
    bool refused;

    HAPPENS_AFTER(port);                /* bind() has made it. */
    zone = atomic_load(&port->nic->zone);
    refused = zone && flow->zone == zone;
    CHECK(!atomic_load(&port->released));
    HAPPENS_BEFORE(&port->counts);
    if (refused) {
        ctoffload_say("not this zone");
    }
    return refused ? CTOFFLOAD_UNSUPPORTED : 0;
}

static void
nic_submit(void *port_, struct ctoffload_op *const ops[], size_t n)
{
    struct nic_port *port = port_;
    struct nic *nic;

    HAPPENS_AFTER(port);
    nic = port->nic;
    /* In the order of their submission, as far as they have one tuple: a whole
     * batch takes the one way or the other, and nothing overtakes what waits. */
    pthread_mutex_lock(&nic->mutex);
    port->counts.submits += n > 0;
    bool later = nic->first || nic->turn++ % 2;
    for (size_t i = 0; later && i < n; i++) {
        struct later *l = malloc(sizeof *l);

        CHECK(l);
        *l = (struct later) { .port = port, .op = ops[i] };
        *nic->last = l;
        nic->last = &l->next;
    }
    pthread_cond_signal(&nic->wake);
    pthread_mutex_unlock(&nic->mutex);
    for (size_t i = 0; !later && i < n; i++) {
        uint64_t name = 0;
        int why;

        pthread_mutex_lock(&nic->mutex);
        why = carry_out(port, ops[i], &name);
        pthread_mutex_unlock(&nic->mutex);
        tell(ops[i], why, name);
    }
    HAPPENS_BEFORE(&port->counts);
}

static int
nic_usage(void *port_, ctoffload_report_fn *report, void *arg)
{
    struct nic_port *port = port_;
    struct ctoffload_report *reports;
    size_t n = 0;

    HAPPENS_AFTER(port);
    pthread_mutex_lock(&port->nic->mutex);
    CHECK(!atomic_load(&port->released));
    reports = calloc(port->counts.rules + 1, sizeof *reports);
    CHECK(reports);
    for (size_t i = 0; i < BUCKETS; i++) {
        for (struct rule *rule = port->buckets[i]; rule; rule = rule->next) {
            struct ctoffload_report *r = &reports[n++];

            *r = (struct ctoffload_report) {
                .size = sizeof *r, .in_hw = 1, .rule = rule->name,
                .packets = rule->packets, .bytes = rule->packets * 100,
            };
            memcpy(r->cookie, rule->cookie, 16);
        }
    }
    pthread_mutex_unlock(&port->nic->mutex);
    for (size_t i = 0; i < n; i++) {
        report(arg, &reports[i]);
    }
    free(reports);
    HAPPENS_BEFORE(&port->counts);
    return 0;
}

static uint64_t
clear(struct nic_port *port)
{
    uint64_t removed = port->counts.rules;

    for (size_t i = 0; i < BUCKETS; i++) {
        while (port->buckets[i]) {
            remove_rule(port, &port->buckets[i]);
        }
    }
    CHECK_IS(port->counts.rules, 0);
    return removed;
}

static int
nic_flush(void *port_, uint64_t *removed)
{
    struct nic_port *port = port_;

    HAPPENS_AFTER(port);
    pthread_mutex_lock(&port->nic->mutex);
    CHECK(!atomic_load(&port->released));
    for (struct later *l = port->nic->first; l; l = l->next) {
        CHECK(l->port != port);         /* All have been completed. */
    }
    *removed = clear(port);
    pthread_mutex_unlock(&port->nic->mutex);
    return 0;
}

static int
nic_release(void *port_)
{
    struct nic_port *port = port_;
    struct nic *nic = port->nic;

    HAPPENS_AFTER(port);
    HAPPENS_AFTER(&port->counts);       /* All others have come back. */
    pthread_mutex_lock(&nic->mutex);
    CHECK(!atomic_exchange(&port->released, true));
    clear(port);
    for (struct nic_port **p = &nic->ports; *p; p = &(*p)->next) {
        if (*p == port) {
            *p = port->next;
            break;
        }
    }
    nic->gone.adds += port->counts.adds;
    nic->gone.refused += port->counts.refused;
    nic->gone.deletes += port->counts.deletes;
    nic->gone.replies += port->counts.replies;
    nic->gone.submits += port->counts.submits;
    nic->gone.released++;
    pthread_mutex_unlock(&nic->mutex);
    free(port);
    return 0;
}

struct nic *
nic_create(void)
{
    struct nic *nic = calloc(1, sizeof *nic);

    CHECK(nic);
    pthread_mutex_init(&nic->mutex, NULL);
    pthread_cond_init(&nic->wake, NULL);
    nic->last = &nic->first;
    CHECK_IS(pthread_create(&nic->thread, NULL, run, nic), 0);
    return nic;
}

void
nic_destroy(struct nic *nic)
{
    pthread_mutex_lock(&nic->mutex);
    nic->stop = true;
    pthread_cond_signal(&nic->wake);
    pthread_mutex_unlock(&nic->mutex);
    pthread_join(nic->thread, NULL);
    CHECK(!nic->ports && !nic->first);
    CHECK_IS(atomic_load(&nic->inits), 0);      /* deinit() has been called. */
    pthread_cond_destroy(&nic->wake);
    pthread_mutex_destroy(&nic->mutex);
    free(nic);
}

void
nic_set_faults(struct nic *nic, struct nic_faults faults)
{
    pthread_mutex_lock(&nic->mutex);
    nic->faults = faults;
    atomic_store(&nic->zone, faults.zone);
    pthread_mutex_unlock(&nic->mutex);
}

static struct ctoffload_class
class_of(struct nic *nic)
{
    return (struct ctoffload_class) {
        .size = sizeof(struct ctoffload_class),
        .name = "nic",
        .ctx = nic,
        .init = nic_init,
        .deinit = nic_deinit,
        .bind = nic_bind,
        .can_offload = nic_can_offload,
        .submit = nic_submit,
        .usage = nic_usage,
        .flush = nic_flush,
        .release = nic_release,
    };
}

void
nic_register(struct nic *nic, struct ctoffload *engine)
{
    struct ctoffload_class class = class_of(nic);

    CHECK_IS(ctoffload_register(engine, &class), 0);
}

void
nic_register_as(struct nic *nic, struct ctoffload *engine, const char *name,
                int (*init)(void *), void *ctx, int error)
{
    struct ctoffload_class class = class_of(nic);

    class.name = name;
    class.init = init;
    class.deinit = NULL;
    class.ctx = ctx;
    CHECK_IS(ctoffload_register(engine, &class), -error);
}

struct nic_counts
nic_counts(struct nic *nic, uint32_t id)
{
    struct nic_counts counts = { 0 };

    pthread_mutex_lock(&nic->mutex);
    if (!id) {
        counts = nic->gone;
    }
    for (struct nic_port *p = nic->ports; p; p = p->next) {
        if (!id || p->id == id) {
            counts.adds += p->counts.adds;
            counts.refused += p->counts.refused;
            counts.deletes += p->counts.deletes;
            counts.replies += p->counts.replies;
            counts.submits += p->counts.submits;
            counts.rules += p->counts.rules;
        }
    }
    pthread_mutex_unlock(&nic->mutex);
    return counts;
}

void
nic_hit_all(struct nic *nic)
{
    pthread_mutex_lock(&nic->mutex);
    for (struct nic_port *p = nic->ports; p; p = p->next) {
        for (size_t i = 0; i < BUCKETS; i++) {
            for (struct rule *rule = p->buckets[i]; rule; rule = rule->next) {
                rule->packets++;
            }
        }
    }
    pthread_mutex_unlock(&nic->mutex);
}

void
nic_for_each(struct nic *nic, void (*each)(void *, const struct nic_rule *),
             void *arg)
{
    pthread_mutex_lock(&nic->mutex);
    for (struct nic_port *p = nic->ports; p; p = p->next) {
        for (size_t i = 0; i < BUCKETS; i++) {
            for (struct rule *rule = p->buckets[i]; rule; rule = rule->next) {
                each(arg, &rule->what);
            }
        }
    }
    pthread_mutex_unlock(&nic->mutex);
}
