/* SPDX-License-Identifier: Apache-2.0
 *
 * What a packet of a decided connection costs a C program: the loop that
 * 'tests/bench' runs beside its own, which is the same in Rust. */

#include <string.h>
#include <time.h>

#include "check.h"

#define BATCH 32
#define PORT 1

struct packet {
    struct ctoffload_conn *conn;
    enum ctoffload_direction direction;
};

struct bench {
    struct ctoffload *engine;
    struct packet *packets;
    size_t n;
};

/* A provider that costs nothing. */
static int
bind(void *ctx, const struct ctoffload_netdev *netdev, void **provider)
{
    (void) ctx, (void) netdev;
    *provider = NULL;
    return 0;
}

static void
submit(void *provider, struct ctoffload_op *const ops[], size_t n)
{
    (void) provider;
    for (size_t i = 0; i < n; i++) {
        ctoffload_op_done(ops[i], ops[i]->epoch << 1
                          | (ops[i]->flow ? ops[i]->flow->direction : 0), 1);
    }
}

static int
usage(void *provider, ctoffload_report_fn *report, void *arg)
{
    (void) provider, (void) report, (void) arg;
    return 0;
}

static int
flush(void *provider, uint64_t *removed)
{
    (void) provider;
    *removed = 0;
    return 0;
}

static int
release(void *provider)
{
    (void) provider;
    return 0;
}

static void
install(struct bench *bench)
{
    struct ctoffload_path path = {
        .size = sizeof path, .kind = CTOFFLOAD_FORWARD, .egress = 99,
        .ingress_mtu = 1500, .mtu = 1500,
    };
    struct ctoffload_worker *worker;
    struct ctoffload_port port;

    CHECK_IS(ctoffload_worker_create(bench->engine, &worker), 0);
    CHECK_IS(ctoffload_worker_port(worker, PORT, &port), 0);
    for (size_t i = 0; i < bench->n; i++) {
        struct ctoffload_slot slot = {
            .conn = bench->packets[i].conn,
            .direction = bench->packets[i].direction,
        };
        struct ctoffload_slot_state now = { .size = sizeof now };
        struct ctoffload_offer offer = {
            .size = sizeof offer, .conn = slot.conn, .path = &path,
            .direction = (uint8_t) slot.direction,
        };

        CHECK_IS(ctoffload_conn_add(worker, &port, &offer, 1), 0);
        do {
            CHECK_IS(ctoffload_slot_state(bench->engine, &slot, PORT, &now), 0);
        } while (now.state != CTOFFLOAD_INSTALLED);
    }
    ctoffload_worker_destroy(worker);
}

/* An engine with two ports and 'conns' connections, both directions of which
 * are installed on the first. */
struct bench *
capi_bench_create(size_t conns)
{
    struct ctoffload_config config = { .size = sizeof config };
    struct ctoffload_class class = {
        .size = sizeof class, .name = "nothing", .bind = bind,
        .submit = submit, .usage = usage, .flush = flush, .release = release,
    };
    struct ctoffload_new_port new = { .size = sizeof new };
    struct bench *bench = calloc(1, sizeof *bench);

    CHECK(bench);
    CHECK_IS(ctoffload_open(&config, NULL, &bench->engine), 0);
    CHECK_IS(ctoffload_register(bench->engine, &class), 0);
    for (new.id = PORT; new.id <= PORT + 1; new.id++) {
        CHECK_IS(ctoffload_port_add(bench->engine, &new, NULL), 0);
    }
    bench->n = 2 * conns;
    bench->packets = calloc(bench->n, sizeof *bench->packets);
    CHECK(bench->packets);
    for (size_t i = 0; i < conns; i++) {
        struct ctoffload_new_conn conn = {
            .size = sizeof conn,
            .original = {
                .family = 4, .protocol = 6, .sport = 1, .dport = 2,
                .src = { 10, (uint8_t) (i >> 16), (uint8_t) (i >> 8), (uint8_t) i },
                .dst = { 192, 0, 2, 1 },
            },
        };
        struct ctoffload_tuple *reply = &conn.reply;

        *reply = conn.original;
        memcpy(reply->src, conn.original.dst, 16);
        memcpy(reply->dst, conn.original.src, 16);
        reply->sport = conn.original.dport;
        reply->dport = conn.original.sport;
        for (unsigned d = 0; d < 2; d++) {
            struct packet *packet = &bench->packets[2 * i + d];

            packet->direction = d;
            CHECK_IS(ctoffload_conn_create(bench->engine, &conn, &packet->conn),
                     0);
        }
    }
    install(bench);
    return bench;
}

void
capi_bench_destroy(struct bench *bench)
{
    for (size_t i = 0; i < bench->n; i++) {
        ctoffload_conn_unref(bench->packets[i].conn);
    }
    CHECK_IS(ctoffload_close(bench->engine), 0);
    free(bench->packets);
    free(bench);
}

struct ctoffload_worker *
capi_bench_hire(const struct bench *bench)
{
    struct ctoffload_worker *worker;

    CHECK_IS(ctoffload_worker_create(bench->engine, &worker), 0);
    return worker;
}

void
capi_bench_dismiss(struct ctoffload_worker *worker)
{
    ctoffload_worker_destroy(worker);
}

/* Goes through all packets that many times; returns how many were not
 * decided. */
size_t
capi_bench_run(const struct bench *bench, struct ctoffload_worker *worker,
               size_t times)
{
    const struct packet *packets = bench->packets;
    const struct packet *last = packets + bench->n;
    size_t undecided = 0;

    for (size_t t = 0; t < times; t++) {
        for (const struct packet *batch = packets; batch < last;) {
            const struct packet *end
                = last - batch > BATCH ? batch + BATCH : last;
            struct ctoffload_port found, port;

            ctoffload_worker_quiescent(worker);
            if (ctoffload_worker_port(worker, PORT, &found)) {
                return SIZE_MAX;
            }
            port = found;       /* Nobody else knows where this one is. */
            for (; batch < end; batch++) {
                undecided += !ctoffload_is_decided(&port, batch->conn,
                                                   batch->direction);
            }
        }
    }
    return undecided;
}
