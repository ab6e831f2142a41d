/* SPDX-License-Identifier: Apache-2.0
 *
 * A small switch with several packet threads, whose conntrack tells the engine
 * of its connections by the class of 'ct-offload.h', and whose NIC is 'nic.c'.
 * Ports come and go, connections end and come back, all under traffic; then
 * everything stands still, and what must hold is looked at.
 *
 *     switch SECONDS THREADS */

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "check.h"
#include "ct-offload.h"
#include "nic.h"

#define CONNS 1024
#define PORTS 6                 /* That packets arrive on. */
#define MAX_THREADS 8

/* One of which no packet is ever seen, and one that has no provider. */
#define IDLE (PORTS)
#define FOREIGN (PORTS + 1)
#define ALL_PORTS (PORTS + 2)

static const struct ct_offload_class *class = &ct_offload_ctoffload;

static struct ctoffload *engine;
static _Atomic(struct conn *) conns[CONNS];
static atomic_bool stop;
static atomic_bool pause_now;

/* Which batch a thread is in; OFFLINE: none.  What was unlinked before each has
 * begun another one is seen by nobody. */
#define OFFLINE UINT64_MAX
static _Atomic uint64_t batches[MAX_THREADS];
static unsigned n_threads;

struct totals {
    uint64_t packets, undecided, unbound, stale, no_port;
};
static struct totals totals[MAX_THREADS];

/* Ports 1 and 2 are netdevs by their number; the others are none. */
static uint32_t
port_id(unsigned port)
{
    return port < 2 ? port + 1 : CTOFFLOAD_PORT_LOCAL | port;
}

static unsigned
random_below(unsigned *seed, unsigned n)
{
    *seed = *seed * 1664525 + 1013904223;
    return (*seed >> 8) % n;
}

static struct conn *
conn_new(unsigned index)
{
    struct conn *conn = calloc(1, sizeof *conn);
    struct ctoffload_tuple *t;

    CHECK(conn);
    conn->index = index;
    conn->zone = index % 4 == 3;
    t = &conn->tuples[0];
    t->family = 4;
    t->protocol = index % 2 ? 17 : 6;
    memcpy(t->src, (uint8_t[4]) { 10, index >> 16, index >> 8, index }, 4);
    memcpy(t->dst, (uint8_t[4]) { 192, 0, 2, 1 }, 4);
    t->sport = (uint16_t) index;
    t->dport = 0x5000;
    conn->tuples[1] = *t;
    memcpy(conn->tuples[1].src, t->dst, 16);
    memcpy(conn->tuples[1].dst, t->src, 16);
    conn->tuples[1].sport = t->dport;
    conn->tuples[1].dport = t->sport;
    /* The NIC finds the index in the source: of answers too. */
    memcpy(&conn->tuples[1].src[1], &t->src[1], 3);
    CHECK_IS(class->conn_init(conn), 0);
    return conn;
}

/* The ports that a direction can arrive on: of every fourth connection two; of
 * some both directions arrive on one. */
static unsigned
port_of(const struct conn *conn, unsigned direction, unsigned *seed)
{
    unsigned port = conn->index + (conn->index % 8 == 2 ? 0 : 2 * direction);

    if (conn->index % 4 == 0) {
        port += random_below(seed, 2);
    }
    return port % PORTS;
}

static void
make_path(struct ctoffload_path *path, const struct conn *conn,
          unsigned direction)
{
    memset(path, 0, sizeof *path);
    path->size = sizeof *path;
    path->kind = conn->index % 8 == 1 ? CTOFFLOAD_TRACK : CTOFFLOAD_FORWARD;
    if (path->kind == CTOFFLOAD_FORWARD) {
        path->flags = CTOFFLOAD_PATH_ROUTED;
        /* Not into a port that comes and goes: what leads there is taken back
         * too, as is tested for itself. */
        path->egress = 1000 + direction;
        path->ingress_mtu = path->mtu = 1500;
    }
}

struct burst {
    struct ct_offload_ctx ctxs[CT_OFFLOAD_BATCH];
    struct ctoffload_path paths[CT_OFFLOAD_BATCH];
    size_t n;
};

static void
packets(struct ct_offload_thread *thread, unsigned *seed, struct totals *total)
{
    struct burst bursts[PORTS];
    unsigned reply_at = random_below(seed, CT_OFFLOAD_BATCH);

    for (unsigned p = 0; p < PORTS; p++) {
        bursts[p].n = 0;
    }
    for (unsigned i = 0; i < CT_OFFLOAD_BATCH; i++) {
        unsigned index = random_below(seed, CONNS);
        struct conn *conn = atomic_load_explicit(&conns[index],
                                                 memory_order_acquire);
        unsigned direction = random_below(seed, 2);
        struct burst *burst;

        if (!conn) {
            continue;
        }
        burst = &bursts[port_of(conn, direction, seed)];
        burst->ctxs[burst->n++] = (struct ct_offload_ctx) {
            .conn = conn, .direction = direction,
        };
    }
    for (unsigned p = 0; p < PORTS; p++) {
        struct burst *burst = &bursts[p];
        size_t undecided = 0;
        int error;

        error = ctoffload_worker_port(thread->worker, port_id(p), &thread->port);
        CHECK(error == 0 || error == -ENODEV);
        if (error) {
            total->no_port++;
        }
        for (size_t i = 0; i < burst->n; i++) {
            struct ct_offload_ctx ctx = burst->ctxs[i];
            unsigned d = ctx.direction;

            total->packets++;
            if (ctoffload_is_decided(&thread->port, ctx.conn->offload, d)) {
                continue;
            }
            if (!thread->port.bound) {
                total->unbound++;
                continue;
            }
            total->undecided++;
            atomic_fetch_or(&ctx.conn->seen[d], 1u << p);
            make_path(&burst->paths[undecided], ctx.conn, d);
            ctx.path = &burst->paths[undecided];
            burst->ctxs[undecided++] = ctx;
        }
        if (undecided == 1) {
            error = class->conn_add(thread, &burst->ctxs[0]);
        } else {
            error = class->batch(CT_OFFLOAD_OP_ADD, thread, burst->ctxs,
                                 undecided, 0);
        }
        CHECK(error == 0 || (error == -ESTALE && !undecided));
        for (size_t i = 0; i < undecided; i++) {
            CHECK(burst->ctxs[i].conn->offload);
        }
        if (undecided && thread->port.bound && reply_at == 0) {
            class->conn_established(thread, &burst->ctxs[0]);
            class->can_offload(thread, &burst->ctxs[0]);
        }
    }
}

static void *
packet_thread(void *number_)
{
    unsigned number = (unsigned) (uintptr_t) number_;
    struct ct_offload_thread thread = { 0 };
    struct totals total = { 0 };
    unsigned seed = 12345 + number;

    CHECK_IS(ctoffload_worker_create(engine, &thread.worker), 0);
    for (uint64_t batch = 1; !atomic_load(&stop); batch++) {
        if (random_below(&seed, 500) == 0 || atomic_load(&pause_now)) {
            /* Blocks a little, as in a poll. */
            struct ctoffload_port port;

            ctoffload_worker_offline(thread.worker);
            CHECK_IS(ctoffload_worker_port(thread.worker, port_id(IDLE), &port),
                     -ENODEV);
            CHECK(!port.bound);
            atomic_store(&batches[number], OFFLINE);
            while (atomic_load(&pause_now) && !atomic_load(&stop)) {
                sched_yield();
            }
            nanosleep(&(struct timespec) { .tv_nsec = 50000 }, NULL);
            atomic_store(&batches[number], batch);
            ctoffload_worker_online(thread.worker);
        }
        atomic_store(&batches[number], batch);
        ctoffload_worker_quiescent(thread.worker);
        packets(&thread, &seed, &total);
    }
    atomic_store(&batches[number], OFFLINE);
    ctoffload_worker_destroy(thread.worker);
    totals[number] = total;
    return NULL;
}

/* Waits until no thread is in a batch that had begun before. */
static void
grace_period(void)
{
    uint64_t before[MAX_THREADS];

    for (unsigned i = 0; i < n_threads; i++) {
        before[i] = atomic_load(&batches[i]);
    }
    for (unsigned i = 0; i < n_threads; i++) {
        while (before[i] != OFFLINE && atomic_load(&batches[i]) == before[i]) {
            sched_yield();
        }
    }
}

static void
conn_end(unsigned index)
{
    struct conn *conn = atomic_exchange(&conns[index], NULL);

    if (conn) {
        grace_period();
        class->conn_del(conn);
        free(conn);
    }
}

static void
port_add(unsigned port)
{
    struct ctoffload_new_port new = {
        .size = sizeof new,
        .id = port_id(port),
        .name = port == FOREIGN ? "foreign0" : "nic0",
    };
    uint32_t generation = 0;

    CHECK_IS(ctoffload_port_add(engine, &new, &generation), 0);
    CHECK(generation);
    CHECK_IS(ctoffload_port_add(engine, &new, NULL), -EEXIST);
}

static long long
now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* What is in the NIC, and what the engine says is. */
struct census {
    uint64_t rules;
    uint64_t by_port[ALL_PORTS];
};

static void
look(void *census_, const struct nic_rule *rule)
{
    struct census *census = census_;
    struct conn *conn;
    unsigned port;

    CHECK(rule->index < CONNS && rule->direction < 2);
    conn = atomic_load(&conns[rule->index]);
    /* Of a living connection, and of this incarnation. */
    CHECK(conn);
    CHECK_IS(rule->epoch, ctoffload_conn_epoch(conn->offload));
    for (port = 0; port < ALL_PORTS && port_id(port) != rule->port; port++) {
        continue;
    }
    CHECK(port < PORTS);
    /* Where a packet of it was seen, and nowhere else. */
    CHECK(atomic_load(&conn->seen[rule->direction]) & 1u << port);
    census->rules++;
    census->by_port[port]++;
}

/* Everything that was asked for has come to its end. */
static void
stand_still(void)
{
    long long deadline = now_ms() + 60000;

    for (;;) {
        bool busy = false;

        for (unsigned port = 0; port < ALL_PORTS; port++) {
            struct ctoffload_port_stats stats = { .size = sizeof stats };
            int error = ctoffload_port_stats(engine, port_id(port), &stats);

            CHECK(error == 0 || error == -ENODEV);
            CHECK(!stats.faulty);
            busy |= stats.pending || stats.deleting;
        }
        if (!busy) {
            return;
        }
        CHECK(now_ms() < deadline);
        nanosleep(&(struct timespec) { .tv_nsec = 1000000 }, NULL);
    }
}

static void
check_all(struct nic *nic, bool whole)
{
    struct ctoffload_swept swept = { .size = sizeof swept };
    struct census census = { 0 };

    /* No thread goes on, and what waits is done. */
    atomic_store(&pause_now, true);
    for (unsigned i = 0; i < n_threads; i++) {
        while (atomic_load(&batches[i]) != OFFLINE) {
            sched_yield();
        }
    }
    stand_still();
    nic_for_each(nic, look, &census);
    CHECK_IS(census.rules, nic_counts(nic, 0).rules);
    if (whole) {
        CHECK(census.rules > 0);
    }
    for (unsigned port = 0; port < ALL_PORTS; port++) {
        struct ctoffload_port_stats stats = { .size = sizeof stats };

        if (ctoffload_port_stats(engine, port_id(port), &stats)) {
            CHECK_IS(census.by_port[port], 0);
            continue;
        }
        CHECK_IS(stats.bound, port != FOREIGN);
        CHECK_IS(census.by_port[port], stats.installed);
        CHECK_IS(stats.in_hw, stats.installed);
        if (port >= PORTS) {
            /* Nobody has seen anything there: nothing has been done. */
            CHECK_IS(stats.sights + stats.adds + stats.rejections, 0);
            CHECK_IS(nic_counts(nic, port_id(port)).submits, 0);
        }
    }
    /* The NIC carries packets: the sweep finds every rule, and none too many,
     * and connections live longer. */
    nic_hit_all(nic);
    CHECK_IS(ctoffload_sweep(engine, &swept), 0);
    CHECK_IS(swept.rules, census.rules);
    CHECK_IS(swept.strays + swept.lost + swept.faults, 0);
    for (unsigned i = 0; i < CONNS; i++) {
        struct conn *conn = atomic_load(&conns[i]);
        struct ctoffload_use use = { .size = sizeof use };

        if (!conn) {
            continue;
        }
        use.conn = conn->offload;
        CHECK_IS(ctoffload_conn_update(engine, &use, 1), 0);
        CHECK(use.usage == CTOFFLOAD_NOT_OFFLOADED
              || use.usage == CTOFFLOAD_LAST_USED);
        CHECK((use.packets > 0) == (use.usage == CTOFFLOAD_LAST_USED));
        atomic_store(&conn->expiry_ms, 5);
        CHECK_IS(class->conn_update(conn, 1000), 0);
        if (use.usage == CTOFFLOAD_LAST_USED) {
            CHECK(atomic_load(&conn->expiry_ms) >= 1000);
        } else {
            CHECK_IS(atomic_load(&conn->expiry_ms), 5);
        }
    }
    atomic_store(&pause_now, false);
}

int
main(int argc, char *argv[])
{
    struct ctoffload_config config = { .size = sizeof config };
    long long end = now_ms() + 1000 * (argc > 1 ? atoi(argv[1]) : 2);
    unsigned deletions = 0, endings = 0, flushes = 0, checks = 0;
    pthread_t threads[MAX_THREADS];
    struct nic *nic = nic_create();
    struct totals sum = { 0 };
    struct nic_counts counts;
    bool there[PORTS];
    unsigned seed = 99;

    n_threads = argc > 2 ? (unsigned) atoi(argv[2]) : 3;
    CHECK(n_threads > 0 && n_threads <= MAX_THREADS);
    CHECK_IS(ctoffload_open(&config, NULL, &engine), 0);
    CHECK_IS(class->init(engine), 0);
    nic_register(nic, engine);
    nic_set_faults(nic, (struct nic_faults) {
        .busy_every = 17, .refuse_every = 101, .capacity = 500, .zone = 1,
    });
    for (unsigned port = 0; port < ALL_PORTS; port++) {
        port_add(port);
        if (port < PORTS) {
            there[port] = true;
        }
    }
    for (unsigned i = 0; i < CONNS; i++) {
        atomic_store(&conns[i], conn_new(i));
    }
    for (unsigned i = 0; i < n_threads; i++) {
        atomic_store(&batches[i], 1);
        CHECK_IS(pthread_create(&threads[i], NULL, packet_thread,
                                (void *) (uintptr_t) i), 0);
    }

    for (unsigned turn = 0; turn < 40 || now_ms() < end; turn++) {
        unsigned port = random_below(&seed, PORTS);
        unsigned index = random_below(&seed, CONNS);

        for (unsigned i = 0; i < 8; i++, index = (index + 7) % CONNS) {
            if (atomic_load(&conns[index])) {
                conn_end(index);
                endings++;
            } else {
                atomic_store(&conns[index], conn_new(index));
            }
        }
        if (turn % 8 == 0) {
            if (there[port]) {
                struct ctoffload_port_deleted deleted = {
                    .size = sizeof deleted,
                };

                CHECK_IS(ctoffload_port_del(engine, port_id(port), &deleted), 0);
                CHECK_IS(deleted.faults, 0);
                CHECK_IS(ctoffload_port_del(engine, port_id(port), NULL),
                         -ENODEV);
                CHECK_IS(nic_counts(nic, port_id(port)).rules, 0);
                deletions++;
            } else {
                port_add(port);
            }
            there[port] = !there[port];
        }
        if (turn % 16 == 3) {
            CHECK(class->flush(turn % 32 == 3 ? -1 : 0) >= 0);
            flushes++;
        }
        if (turn % 32 == 31) {
            check_all(nic, false);
            checks++;
        }
        nanosleep(&(struct timespec) { .tv_nsec = 1000000 }, NULL);
    }

    /* All is there, and nothing fails any more: all is offloaded, but for the
     * zone that the NIC does not take. */
    nic_set_faults(nic, (struct nic_faults) { .zone = 1 });
    for (unsigned port = 0; port < PORTS; port++) {
        if (!there[port]) {
            port_add(port);
        }
    }
    for (unsigned i = 0; i < CONNS; i++) {
        conn_end(i);
        atomic_store(&conns[i], conn_new(i));
    }
    CHECK(class->flush(-1) >= 0);
    unsigned wanted = 0;
    for (unsigned i = 0; i < CONNS; i++) {
        wanted += i % 4 == 3 ? 0 : i % 4 == 0 ? 4 : 2;
    }
    for (long long deadline = now_ms() + 60000;
         nic_counts(nic, 0).rules < wanted;) {
        CHECK(now_ms() < deadline);
        nanosleep(&(struct timespec) { .tv_nsec = 1000000 }, NULL);
    }
    check_all(nic, true);
    CHECK_IS(nic_counts(nic, 0).rules, wanted);
    /* Every connection is decided, on each of its ports. */
    CHECK_IS(ctoffload_close(engine), -EBUSY);
    atomic_store(&stop, true);
    for (unsigned i = 0; i < n_threads; i++) {
        pthread_join(threads[i], NULL);
        sum.packets += totals[i].packets;
        sum.undecided += totals[i].undecided;
        sum.unbound += totals[i].unbound;
        sum.no_port += totals[i].no_port;
    }
    /* The end: half of the connections are still there. */
    for (unsigned i = 0; i < CONNS / 2; i++) {
        conn_end(i);
    }
    CHECK_IS(ctoffload_close(engine), 0);
    counts = nic_counts(nic, 0);
    CHECK_IS(counts.rules, 0);
    CHECK_IS(counts.bound, counts.released);
    for (unsigned i = CONNS / 2; i < CONNS; i++) {
        struct conn *conn = atomic_exchange(&conns[i], NULL);

        /* They outlive the engine. */
        CHECK(ctoffload_conn_epoch(conn->offload));
        ctoffload_conn_unref(conn->offload);
        free(conn);
    }
    nic_destroy(nic);
    CHECK(deletions && endings && flushes && counts.refused && counts.replies);
    printf("ok: %llu packets, %llu of them undecided, %llu adds, %llu refused, "
           "%llu deletes, %llu replies told; %u ports deleted, %u connections "
           "ended, %u flushes, looked at %u times\n",
           (unsigned long long) sum.packets, (unsigned long long) sum.undecided,
           counts.adds, counts.refused, counts.deletes, counts.replies,
           deletions, endings, flushes, checks + 1);
    return 0;
}
