/* SPDX-License-Identifier: Apache-2.0
 *
 * The class on ctoffload. */

#include "ct-offload.h"

#include <errno.h>

#include "check.h"

static struct ctoffload *engine;

static int
init(struct ctoffload *engine_)
{
    engine = engine_;
    return 0;
}

static int
conn_init(struct conn *conn)
{
    struct ctoffload_new_conn new = {
        .size = sizeof new,
        .zone = conn->zone,
        .tag = conn->index,
        .original = conn->tuples[0],
        .reply = conn->tuples[1],
    };

    return ctoffload_conn_create(engine, &new, &conn->offload);
}

static int
batch(enum ct_offload_op_type type, struct ct_offload_thread *thread,
      const struct ct_offload_ctx *ctxs, size_t n, long long timeout_ms)
{
    struct ctoffload_offer offers[CT_OFFLOAD_BATCH] = { { 0 } };
    struct ctoffload_slot slots[CT_OFFLOAD_BATCH] = { { 0 } };
    struct ctoffload_conn *conns[CT_OFFLOAD_BATCH];
    struct ctoffload_use uses[CT_OFFLOAD_BATCH] = { { 0 } };
    int error;

    if (n > CT_OFFLOAD_BATCH) {
        return -EINVAL;
    }
    for (size_t i = 0; i < n; i++) {
        struct ctoffload_conn *conn = ctxs[i].conn->offload;

        conns[i] = conn;
        uses[i] = (struct ctoffload_use) { .size = sizeof uses[i], .conn = conn };
        slots[i] = (struct ctoffload_slot) {
            .conn = conn, .direction = ctxs[i].direction,
        };
        offers[i] = (struct ctoffload_offer) {
            .size = sizeof offers[i], .direction = (uint8_t) ctxs[i].direction,
            .conn = conn, .path = ctxs[i].path,
        };
    }

    switch (type) {
    case CT_OFFLOAD_OP_ADD:
        return ctoffload_conn_add(thread->worker, &thread->port, offers, n);

    case CT_OFFLOAD_OP_EST:
        return ctoffload_conn_established(thread->worker, &thread->port, slots,
                                          n);

    case CT_OFFLOAD_OP_DEL:
        return ctoffload_conn_del(engine, conns, n, NULL);

    case CT_OFFLOAD_OP_UPDATE:
        error = ctoffload_conn_update(engine, uses, n);
        for (size_t i = 0; !error && i < n; i++) {
            long long expiry = atomic_load(&ctxs[i].conn->expiry_ms);

            expiry = (long long) ctoffload_extended_expiry(
                (uint64_t) expiry, &uses[i], (uint64_t) timeout_ms,
                ctoffload_now_ms(engine));
            atomic_store(&ctxs[i].conn->expiry_ms, expiry);
        }
        return error;
    }
    return -EINVAL;
}

static int
conn_add(struct ct_offload_thread *thread, const struct ct_offload_ctx *ctx)
{
    return batch(CT_OFFLOAD_OP_ADD, thread, ctx, 1, 0);
}

static void
conn_del(struct conn *conn)
{
    CHECK_IS(ctoffload_conn_del(engine, &conn->offload, 1, NULL), 0);
    ctoffload_conn_unref(conn->offload);
    conn->offload = NULL;
}

static int
conn_update(struct conn *conn, long long timeout_ms)
{
    struct ct_offload_ctx ctx = { .conn = conn };

    return batch(CT_OFFLOAD_OP_UPDATE, NULL, &ctx, 1, timeout_ms);
}

static void
conn_established(struct ct_offload_thread *thread,
                 const struct ct_offload_ctx *ctx)
{
    batch(CT_OFFLOAD_OP_EST, thread, ctx, 1, 0);
}

static bool
can_offload(const struct ct_offload_thread *thread,
            const struct ct_offload_ctx *ctx)
{
    struct ctoffload_offer offer = {
        .size = sizeof offer, .direction = (uint8_t) ctx->direction,
        .conn = ctx->conn->offload, .path = ctx->path,
    };

    return !ctoffload_can_offload(thread->worker, &thread->port, &offer);
}

static long long
flush(int zone)
{
    struct ctoffload_filter filter = {
        .size = sizeof filter, .fields = CTOFFLOAD_FILTER_ZONE,
        .zone = (uint16_t) zone,
    };
    uint64_t flushed;
    int error = ctoffload_flush(engine, zone < 0 ? NULL : &filter, &flushed);

    return error ? error : (long long) flushed;
}

const struct ct_offload_class ct_offload_ctoffload = {
    .type = "ctoffload",
    .init = init,
    .conn_init = conn_init,
    .conn_add = conn_add,
    .conn_del = conn_del,
    .conn_update = conn_update,
    .conn_established = conn_established,
    .can_offload = can_offload,
    .flush = flush,
    .batch = batch,
};
