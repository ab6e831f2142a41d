/* SPDX-License-Identifier: Apache-2.0
 *
 * A conntrack-offload class, shaped as the one that was proposed for Open
 * vSwitch: nine functions by which a userspace conntrack tells an offload layer
 * of its connections.  Written for this test; 'ct-offload.c' is the class on
 * ctoffload, each function some lines long. */

#ifndef CT_OFFLOAD_H
#define CT_OFFLOAD_H 1

#include <stdatomic.h>

#include "ctoffload.h"

/* A connection of the datapath's own. */
struct conn {
    struct ctoffload_conn *offload;     /* 8 bytes, and all that is kept. */
    uint32_t index;
    uint16_t zone;
    struct ctoffload_tuple tuples[2];   /* On arrival, by direction. */
    atomic_llong expiry_ms;
    atomic_uint seen[2];                /* Ports, as bits, by direction. */
};

/* A packet that belongs to a connection. */
struct ct_offload_ctx {
    struct conn *conn;
    enum ctoffload_direction direction;
    const struct ctoffload_path *path;
};

enum ct_offload_op_type {
    CT_OFFLOAD_OP_ADD,
    CT_OFFLOAD_OP_DEL,
    CT_OFFLOAD_OP_EST,
    CT_OFFLOAD_OP_UPDATE,
};

/* What a thread of the datapath has: its worker, and a port of this batch. */
struct ct_offload_thread {
    struct ctoffload_worker *worker;
    struct ctoffload_port port;
};

#define CT_OFFLOAD_BATCH 32

struct ct_offload_class {
    const char *type;

    /* Called once, before any other. */
    int (*init)(struct ctoffload *);

    /* A connection was made: nothing is offloaded by that. */
    int (*conn_init)(struct conn *);

    /* A packet of it has been seen on the thread's port. */
    int (*conn_add)(struct ct_offload_thread *, const struct ct_offload_ctx *);

    /* It has ended. */
    void (*conn_del)(struct conn *);

    /* Puts its expiry off, if hardware has used it. */
    int (*conn_update)(struct conn *, long long timeout_ms);

    /* A reply was seen. */
    void (*conn_established)(struct ct_offload_thread *,
                             const struct ct_offload_ctx *);

    bool (*can_offload)(const struct ct_offload_thread *,
                        const struct ct_offload_ctx *);

    /* Of a zone, or of all (-1).  Returns how many. */
    long long (*flush)(int zone);

    /* One kind of operation on up to CT_OFFLOAD_BATCH. */
    int (*batch)(enum ct_offload_op_type, struct ct_offload_thread *,
                 const struct ct_offload_ctx *, size_t n, long long timeout_ms);
};

extern const struct ct_offload_class ct_offload_ctoffload;

#endif /* ct-offload.h */
