/* SPDX-License-Identifier: Apache-2.0
 *
 * ctoffload from C: a per-netdev, lazy connection-offload engine.
 *
 * A connection is offloaded on the port that received its packet, and on no
 * other; every other port offloads it on its own time, when it first sees a
 * packet of it.  Each port is bound to one provider for its whole life.  Packet
 * threads take no lock: for a packet of a connection whose fate on this port
 * is decided, all that is done is one atomic load, here in this header.
 *
 *     ctoffload_open()                  the engine
 *       ctoffload_register()            a kind of backend: a table of callbacks
 *       ctoffload_port_add()            a port, bound to the first that takes it
 *       ctoffload_worker_create()       one per packet thread
 *         ctoffload_worker_quiescent()  once per batch of packets
 *         ctoffload_worker_port()       once per batch and port
 *         ctoffload_is_decided()        for every packet
 *         ctoffload_conn_add()          once per connection, direction and port
 *       ctoffload_conn_del()            the connection has ended
 *     ctoffload_close()
 *
 * Errors
 * ======
 *
 * Functions that return 'int' return 0, or a negative errno; then nothing has
 * changed, unless it is said otherwise.  ctoffload_last_error() has words for
 * it.  What a provider refuses is no error of a call: it is kept per (connection,
 * port, direction) with its reason, and packets take the slow path.  A bug of
 * the library never unwinds into the caller: the call returns -EIO.
 *
 * Threads
 * =======
 *
 * Each function has one of these marks:
 *
 *   [any]     any thread, at any time; does not wait for providers.
 *   [worker]  the thread that the worker belongs to; does not block, takes no
 *             lock, and may make one system call, to wake the port's thread.
 *   [admin]   any thread, but BLOCKS, within the limits of 'struct
 *             ctoffload_config'; never on a thread whose worker is online (it
 *             would wait for itself), and never in a callback.
 *
 *   [callback] in one of the caller's callbacks.
 *
 * Callbacks are called on the library's own threads or on the one that called
 * an [admin] function, as is said at each, and never on a packet thread but for
 * 'can_offload'.  They must come back by returning: no longjmp, no exception.
 *
 * Memory
 * ======
 *
 * What is passed in belongs to the caller, and is read before the call returns;
 * what is handed to a callback is the callback's until it returns.  Where it is
 * otherwise it is said: connections are counted (ctoffload_conn_unref()), an
 * operation is the provider's until it is completed.
 *
 * Versions
 * ========
 *
 * A struct whose first member is 'size' can grow at its end.  Whoever fills it
 * zeroes it and sets 'size' to its sizeof; members called 'reserved' stay zero.  A library that is older than the
 * header refuses what it does not know with -E2BIG, unless that is zero; a newer
 * one takes what is missing for zero.  Structs without 'size', numbers, the layout of the
 * first 16 bytes of 'struct ctoffload_conn', and everything that is 'static
 * inline' here stay as they are within one CTOFFLOAD_ABI. */

#ifndef CTOFFLOAD_H
#define CTOFFLOAD_H 1

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CTOFFLOAD_ABI 0

/* [any] The CTOFFLOAD_ABI that the library was built with. */
uint32_t ctoffload_abi(void);

/* [any] Words for what the last call of this thread that failed has returned:
 * until the next one that fails.  Never NULL. */
const char *ctoffload_last_error(void);

/* [any] Words for an errno, positive or negative.  Static. */
const char *ctoffload_strerror(int error);

/* ---- values ---- */

struct ctoffload;               /* An engine. */
struct ctoffload_worker;        /* A packet thread's view of it. */

/* A connection.  The caller keeps the pointer, in its own connection object.
 * More than this stands behind it; nobody but the library writes to it.
 *
 * A word belongs to the first port that saw the direction: bits 0 to 31 are the
 * port's generation, bits 32 to 34 the state, of which 0 is "nothing yet". */
struct ctoffload_conn {
    uint64_t words[2];          /* By direction. */
};

enum ctoffload_direction {
    CTOFFLOAD_ORIGINAL = 0,     /* As the packet that created the connection. */
    CTOFFLOAD_REPLY = 1,
};

/* Addresses and ports of one direction, in network byte order. */
struct ctoffload_tuple {
    uint8_t family;             /* 4 or 6. */
    uint8_t protocol;           /* 6 (TCP) or 17 (UDP). */
    uint16_t sport, dport;      /* Network byte order. */
    uint8_t src[16], dst[16];   /* Of IPv4 the first four bytes. */
};

/* A port's number: an ifindex, or, for a port that is no netdev of the
 * kernel's (DPDK, vhost-user), a number of the caller's own with this bit. */
#define CTOFFLOAD_PORT_LOCAL UINT32_C(0x80000000)

/* A port as a worker sees it, until its next quiescent state.  A value: what is
 * kept for too long is found out (-ESTALE), and does no harm. */
struct ctoffload_port {
    uint32_t id;                /* The port's number. */
    uint32_t generation;        /* Which life of it.  Never used twice. */
    uint32_t bound;             /* Nonzero: it has a provider. */
};

/* What becomes of the packets of a direction. */
enum ctoffload_path_kind {
    CTOFFLOAD_FORWARD = 1,      /* The rule sends them on, as this path says. */
    CTOFFLOAD_TRACK = 2,        /* The rule only keeps track of them. */
    CTOFFLOAD_RESOLVE = 3,      /* The datapath's 'resolve' is asked, later. */
    CTOFFLOAD_REFUSED = 4,      /* They are kept on the slow path: 'reason'. */
};

enum ctoffload_path_flags {
    CTOFFLOAD_PATH_ETH_DST = 1 << 0,    /* 'eth_dst' is given: else any. */
    CTOFFLOAD_PATH_ROUTED = 1 << 1,     /* 'mac_src' and 'mac_dst' are given,
                                         * and one is taken off the TTL. */
};

/* How the packets of a direction arrive and leave.  Addresses and ports follow
 * from the connection: they leave as the opposite direction's tuple, inverted. */
struct ctoffload_path {
    uint32_t size;
    uint32_t kind;              /* enum ctoffload_path_kind. */
    uint32_t flags;             /* enum ctoffload_path_flags. */
    uint32_t egress;            /* FORWARD: port to send on, which need not be
                                 * one of the engine's. */
    uint32_t ingress_mtu;       /* FORWARD: longest IP packet that arrives, */
    uint32_t mtu;               /* and that may be sent. */
    uint16_t vlan_in, vlan_out; /* 802.1Q tags, 0: none. */
    uint8_t eth_dst[6];         /* On arrival. */
    uint8_t mac_src[6];         /* On departure. */
    uint8_t mac_dst[6];
    uint16_t answer;            /* The caller's number for this path: a path
                                 * with another number is another path. */
    uint32_t mark;              /* RESOLVE: handed on to 'resolve'. */
    uint32_t reason;            /* REFUSED: enum ctoffload_reason. */
    uint32_t reserved;
};

/* Why something is not offloaded.  Numbers are stable; there are more than
 * are named here: ctoffload_reason_name(). */
enum ctoffload_reason {
    CTOFFLOAD_UNSUPPORTED = 1,      /* A match or an action; for good. */
    CTOFFLOAD_TABLE_FULL = 3,       /* Passes. */
    CTOFFLOAD_QUEUE_FULL = 4,       /* Passes. */
    CTOFFLOAD_BUSY = 5,             /* Passes. */
    CTOFFLOAD_NO_ROUTE = 7,         /* Passes. */
    CTOFFLOAD_CONN_STATE = 12,      /* It has ended, or is not established. */
    CTOFFLOAD_CONFLICT = 13,        /* Passes. */
    CTOFFLOAD_OTHER_REFUSAL = 14,   /* For good. */
    CTOFFLOAD_NETDEV_GONE = 15,     /* For good. */
    CTOFFLOAD_PROVIDER_FAULT = 16,  /* For good. */
    CTOFFLOAD_CANCELLED = 17,       /* Passes. */
    CTOFFLOAD_NO_PROVIDER = 19,     /* For good. */
    CTOFFLOAD_NOT_ADMITTED = 22,    /* By the caller's own policy; for good. */
    CTOFFLOAD_PROVIDER_SLOW = 24,   /* Passes. */
};

/* [any] The stable name, "table-full".  Static; "unknown" for no reason. */
const char *ctoffload_reason_name(uint32_t reason);

/* State of (connection, port, direction). */
enum ctoffload_state {
    CTOFFLOAD_EMPTY = 0,
    CTOFFLOAD_PENDING = 1,
    CTOFFLOAD_INSTALLED = 2,
    CTOFFLOAD_DELETING = 3,
    CTOFFLOAD_REJECTED = 4,
};

/* ---- the engine ---- */

/* Zero stands for the default. */
struct ctoffload_config {
    uint32_t size;
    uint32_t instance;          /* Marks the engine's rules; 0: at random. */
    uint64_t connections;       /* How many are kept; 2^20. */
    uint32_t queue;             /* Offers of one thread waiting per port; 65536. */
    uint32_t port_del_ms;       /* How long [admin] waits for workers, and for
                                 * a port that does not go on; 5000. */
    uint32_t complete_ms;       /* How long nothing may come back from a
                                 * provider, before its port is slow; 5000. */
    uint32_t reserved;
};

/* One direction of a connection on a port, as callbacks are told of it. */
struct ctoffload_sight {
    struct ctoffload_conn *conn;        /* The callback's until it returns. */
    uint32_t port;
    uint32_t generation;
    uint32_t direction;
    uint32_t reserved;
};

/* What the engine asks of the datapath that it serves: each may be NULL.
 * Called on a port's thread or on that of an [admin] function. */
struct ctoffload_datapath {
    uint32_t size;
    uint32_t reserved;
    void *ctx;                  /* First argument of each; must outlive the
                                 * engine. */

    /* Finds the path of an offer of CTOFFLOAD_RESOLVE, whose path is 'hint',
     * and fills 'path' with one of CTOFFLOAD_FORWARD ('path' is zeroed, its 'size'
     * set).  Returns 0, a negative errno, or an enum ctoffload_reason.
     * NULL: such an offer is refused. */
    int (*resolve)(void *ctx, const struct ctoffload_sight *,
                   const struct ctoffload_path *hint,
                   struct ctoffload_path *path);

    /* These 'n' slots are empty again: the next packet of each is to be offered
     * again.  A datapath that asks ctoffload_is_decided() for every packet need
     * not do anything. */
    void (*rearm)(void *ctx, const struct ctoffload_sight *, size_t n);

    /* A slot is INSTALLED, REJECTED (then with a reason), or EMPTY: deleted.
     * Called while the slot is locked: it must neither block nor call any
     * function of this header that names the connection. */
    void (*slot_changed)(void *ctx, const struct ctoffload_sight *,
                         uint32_t state, uint32_t reason);
};

/* [any] Makes an engine.  'datapath' may be NULL.  On success '*enginep' is the
 * caller's, to be closed. */
int ctoffload_open(const struct ctoffload_config *,
                   const struct ctoffload_datapath *,
                   struct ctoffload **enginep);

/* [admin] Deletes every port and ends every connection, and frees the engine,
 * which nobody may use any more, except for releasing references of
 * connections.  A provider that does not come back in time is abandoned: until it
 * does, its class, and the datapath's 'ctx', are still needed.  -EBUSY, and nothing has happened, while there are workers. */
int ctoffload_close(struct ctoffload *);

/* [any] The engine's clock: milliseconds, monotonic. */
uint64_t ctoffload_now_ms(const struct ctoffload *);

/* ---- ports ---- */

enum ctoffload_hw_flags {
    CTOFFLOAD_HW_BOTH = 0,      /* In hardware where it takes the rule. */
    CTOFFLOAD_SKIP_SW = 1,      /* In hardware only. */
    CTOFFLOAD_SKIP_HW = 2,      /* In software only. */
};

struct ctoffload_new_port {
    uint32_t size;
    uint32_t id;                        /* Its number. */
    const char *name;                   /* For people; may be NULL. */
    const char *const *providers;       /* Classes to try, in this order, up to
                                         * a NULL; "none" ends the list too.
                                         * NULL: all, as they were
                                         * registered. */
    uint32_t hw_flags;                  /* enum ctoffload_hw_flags. */
    uint32_t capacity;                  /* How many rules it may have; 0: until
                                         * the provider says it is full. */
};

/* [admin] Attaches a port and binds it, for its whole life, to the first class
 * that takes it; if none does, it is a port without a provider, which is no error.
 * '*generation' may be NULL.  -EEXIST: it is one already.  -EBUSY: one of this
 * number is still going.  -ENOENT: there is no such class. */
int ctoffload_port_add(struct ctoffload *, const struct ctoffload_new_port *,
                       uint32_t *generation);

struct ctoffload_port_deleted {
    uint32_t size;
    uint32_t faults;            /* What went wrong on the way. */
    uint64_t flushed;           /* Rules removed from the port, */
    uint64_t retracted;         /* and from others, that led into it. */
};

/* [admin] Deletes a port: no worker offers on it any more, rules of other ports
 * that lead into it go, its own go, its provider is released.  Waits for workers
 * that are online to pass a quiescent state.  '*deleted' may be NULL.
 * -ENODEV. */
int ctoffload_port_del(struct ctoffload *, uint32_t port,
                       struct ctoffload_port_deleted *deleted);

struct ctoffload_port_stats {
    uint32_t size;
    uint32_t generation;
    uint32_t bound;             /* Nonzero: it has a provider. */
    uint32_t faulty;            /* Nonzero: the provider broke the contract. */
    uint32_t slow;              /* Nonzero: it has not come back yet. */
    uint32_t reserved;
    uint64_t pending, installed, rejected, deleting;    /* Slots now. */
    uint64_t in_hw;                                     /* Of those installed. */
    uint64_t sights, adds, deletes, evictions;          /* So far. */
    uint64_t rejections;                                /* For any reason. */
    uint64_t packets, bytes;                            /* As of the last
                                                         * sweep. */
};

/* [any] What there is to tell of a port; looks at each of its slots, so not
 * on the way of packets.  -ENODEV. */
int ctoffload_port_stats(struct ctoffload *, uint32_t port,
                         struct ctoffload_port_stats *);

/* ---- workers ---- */

/* [any] A view of the ports for one more packet thread, online.  '*workerp'
 * belongs to one thread at a time, and to the caller. */
int ctoffload_worker_create(struct ctoffload *, struct ctoffload_worker **workerp);

/* [worker] Ends it.  Nothing of it may be used any more. */
void ctoffload_worker_destroy(struct ctoffload_worker *);

/* [worker] Nothing is held from before this call: once per batch of packets.
 * One load when no port has come or gone. */
void ctoffload_worker_quiescent(struct ctoffload_worker *);

/* [worker] About to block: nobody waits for this worker until it is online
 * again.  It has no ports meanwhile. */
void ctoffload_worker_offline(struct ctoffload_worker *);

/* [worker] Back from blocking. */
void ctoffload_worker_online(struct ctoffload_worker *);

/* [worker] The port of this number, as of the last quiescent state.  A search
 * in a sorted array: once per batch.  -ENODEV: there is none, and '*portp' is
 * one that nothing is decided on and that has no provider. */
int ctoffload_worker_port(const struct ctoffload_worker *, uint32_t id,
                          struct ctoffload_port *portp);

/* ---- connections ---- */

struct ctoffload_new_conn {
    uint32_t size;
    uint16_t zone;
    uint16_t reserved;
    uint64_t tag;                       /* The caller's own mark.  A connection
                                         * of the same tuple and another tag is
                                         * a predecessor, and ended. */
    struct ctoffload_tuple original;    /* Of its first packet. */
    struct ctoffload_tuple reply;       /* Of its answers, on arrival: what is
                                         * not the inverted original is NAT. */
    uint32_t reserved2;
};

/* [any] The connection of this zone, tuple and tag, made where there is none.
 * '*connp' is one reference, the caller's.  A lock of one part of the index.
 * -ENOSPC: as many are kept as may be. */
int ctoffload_conn_create(struct ctoffload *, const struct ctoffload_new_conn *,
                          struct ctoffload_conn **connp);

/* [any] One more reference. */
void ctoffload_conn_ref(struct ctoffload_conn *);

/* [any] Gives a reference back; NULL is none.  It ends nothing.  No packet
 * thread may look at the caller's last one any more: where the caller's own
 * object is freed behind a grace period, this belongs behind it too. */
void ctoffload_conn_unref(struct ctoffload_conn *);

/* [any] Which incarnation it is: what cookies of its rules carry. */
uint64_t ctoffload_conn_epoch(const struct ctoffload_conn *);

enum ctoffload_offer_result {
    CTOFFLOAD_QUEUED = 1,       /* This one was first: it is on its way. */
    CTOFFLOAD_DECIDED = 2,      /* There is nothing to do. */
    CTOFFLOAD_UNBOUND = 3,      /* The port has no provider. */
    CTOFFLOAD_NOT_NOW = 4,      /* Refused at once: 'reason'.  A later packet
                                 * may try again. */
};

struct ctoffload_offer {
    uint32_t size;                      /* The same for all of an array. */
    uint8_t direction;                  /* enum ctoffload_direction. */
    uint8_t result;                     /* Out: enum ctoffload_offer_result. */
    uint8_t reason;                     /* Out. */
    uint8_t reserved;
    struct ctoffload_conn *conn;
    const struct ctoffload_path *path;  /* Not looked at where the result is
                                         * DECIDED or UNBOUND. */
};

/* [worker] These connections were created by packets that arrived on 'port':
 * each is offered to its provider, and to no other.  Any number of threads may
 * offer the same: there is one rule.  The port's thread is woken once.
 * -ESTALE: 'port' is older than the last quiescent state.  -EINVAL: an offer
 * says what cannot be, and none is made. */
int ctoffload_conn_add(struct ctoffload_worker *, const struct ctoffload_port *port,
                       struct ctoffload_offer *offers, size_t n);

/* [worker] The same for packets of connections that there are: the lazy add of
 * each further port. */
int ctoffload_conn_seen(struct ctoffload_worker *, const struct ctoffload_port *port,
                        struct ctoffload_offer *offers, size_t n);

/* [worker] Whether 'offer' would be taken, without making it: 0, -EOPNOTSUPP (for
 * good) or -EAGAIN, with 'offer->reason' and words.  Not for every packet: a call
 * of the provider's, and two locks that are held for a moment.  -EINVAL for
 * CTOFFLOAD_RESOLVE, of which nothing is known yet. */
int ctoffload_can_offload(const struct ctoffload_worker *,
                          const struct ctoffload_port *port,
                          struct ctoffload_offer *offer);

/* One direction of a connection. */
struct ctoffload_slot {
    struct ctoffload_conn *conn;
    uint32_t direction;
    uint32_t reserved;
};

/* [worker] Replies of these connections were seen.  Remembered for their life,
 * and told to the provider once per rule, when it is installed; now where
 * the given direction has one on 'port'.  -ESTALE, and nothing is remembered. */
int ctoffload_conn_established(struct ctoffload_worker *,
                               const struct ctoffload_port *port,
                               const struct ctoffload_slot *slots, size_t n);

enum ctoffload_usage {
    CTOFFLOAD_NOT_OFFLOADED = 0,        /* What the caller saw is all. */
    CTOFFLOAD_UNKNOWN = 1,              /* Under way: do not let it expire. */
    CTOFFLOAD_LAST_USED = 2,            /* At 'last_used_ms'. */
};

struct ctoffload_use {
    uint32_t size;                      /* The same for all of an array. */
    uint32_t usage;                     /* Out: enum ctoffload_usage. */
    struct ctoffload_conn *conn;
    uint64_t last_used_ms;              /* Out: on the engine's clock. */
    uint64_t packets, bytes;            /* Out: of its present rules. */
};

/* [any] When these connections were last used by rules, as of the last sweep. A
 * lock of each slot: not on the way of packets. */
int ctoffload_conn_update(struct ctoffload *, struct ctoffload_use *uses,
                          size_t n);

/* [any] When the connection may expire: never earlier than 'expiry_ms', which is
 * what it would be without offload. */
uint64_t ctoffload_extended_expiry(uint64_t expiry_ms, const struct ctoffload_use *,
                                   uint64_t timeout_ms, uint64_t now_ms);

/* [any] These connections have ended: their rules are deleted, on the ports that
 * hold any, and nobody is waited for.  Their references stay the caller's.
 * '*rules', which may be NULL: how many there were. */
int ctoffload_conn_del(struct ctoffload *, struct ctoffload_conn *const conns[],
                       size_t n, uint64_t *rules);

/* [any] The same, but they live on in software, and their next packets offer
 * them again. */
int ctoffload_conn_retract(struct ctoffload *, struct ctoffload_conn *const conns[],
                           size_t n, uint64_t *rules);

struct ctoffload_slot_state {
    uint32_t size;
    uint32_t state;             /* enum ctoffload_state. */
    uint32_t reason;            /* Of REJECTED; else 0. */
    int32_t in_hw;              /* Of INSTALLED: 1, 0, or -1 for "unknown". */
    uint64_t rule;              /* The provider's name for it, or 0. */
    uint64_t packets, bytes;    /* As of the last sweep. */
};

/* [any] The state of one slot.  A lock of it.  An EMPTY one is no error. */
int ctoffload_slot_state(struct ctoffload *, const struct ctoffload_slot *,
                         uint32_t port, struct ctoffload_slot_state *);

enum ctoffload_filter_fields {
    CTOFFLOAD_FILTER_PORT = 1 << 0,
    CTOFFLOAD_FILTER_ZONE = 1 << 1,
    CTOFFLOAD_FILTER_TUPLE = 1 << 2,
};

struct ctoffload_filter {
    uint32_t size;
    uint32_t fields;                    /* enum ctoffload_filter_fields: those
                                         * that are looked at. */
    uint32_t port;
    uint16_t zone;
    uint16_t reserved;
    struct ctoffload_tuple tuple;       /* Of either direction. */
    uint16_t reserved2;
};

/* [admin] Takes rules away: of all (NULL), or of what the filter says.
 * Connections live on in software.  '*flushed' may be NULL. */
int ctoffload_flush(struct ctoffload *, const struct ctoffload_filter *,
                    uint64_t *flushed);

struct ctoffload_swept {
    uint32_t size;
    uint32_t faults;            /* Ports that were not swept to the end. */
    uint64_t rules;             /* Reported. */
    uint64_t used;              /* Connections used since the sweep before. */
    uint64_t strays;            /* Rules that no slot stands for. */
    uint64_t lost;              /* Slots whose rule was gone. */
};

/* [admin] Reads the counters of every rule, and finds what is not as it should
 * be.  One at a time: a second waits.  '*swept' may be NULL. */
int ctoffload_sweep(struct ctoffload *, struct ctoffload_swept *swept);

/* ---- providers ---- */

/* A port that a provider is asked to serve. */
struct ctoffload_netdev {
    uint32_t size;
    uint32_t id;                /* Its number. */
    uint32_t generation;
    uint32_t hw_flags;          /* enum ctoffload_hw_flags. */
    uint32_t instance;          /* The engine's, as in cookies. */
    uint32_t reserved;
    const char *name;
};

enum ctoffload_flow_flags {
    CTOFFLOAD_FLOW_ETH_DST = 1 << 0,    /* 'eth_dst' is matched. */
    CTOFFLOAD_FLOW_ROUTED = 1 << 1,     /* MACs are set, the TTL is lowered. */
    CTOFFLOAD_FLOW_NAT = 1 << 2,        /* 'leaving' is not 'arriving'. */
};

/* What is to be offloaded: the packets that arrive like this, exactly.  What a
 * provider cannot tell apart it must leave to the slow path: fragments, IP
 * options, TTL 0 and 1 (where it lowers it), TCP packets with SYN, FIN or RST,
 * packets longer than 'mtu', frames with another tag. */
struct ctoffload_flow {
    uint32_t size;
    uint32_t kind;              /* CTOFFLOAD_FORWARD, or CTOFFLOAD_TRACK: then
                                 * the members that say how packets leave, but
                                 * for 'leaving', are zero. */
    uint32_t flags;             /* enum ctoffload_flow_flags. */
    uint32_t egress;
    uint32_t ingress_mtu, mtu;
    uint16_t vlan_in, vlan_out; /* 0: none. */
    uint16_t zone;
    uint16_t direction;         /* enum ctoffload_direction. */
    uint8_t eth_dst[6], mac_src[6], mac_dst[6];
    struct ctoffload_tuple arriving, leaving;
    uint16_t reserved;
};

enum ctoffload_op_kind {
    CTOFFLOAD_OP_ADD = 1,               /* Install a rule for 'flow'. */
    CTOFFLOAD_OP_DELETE = 2,            /* Remove 'rule'; that there is none any
                                         * more is success. */
    CTOFFLOAD_OP_ESTABLISHED = 3,       /* A reply was seen: informative. */
};

/* An operation.  The provider's from 'submit' on, until it completes it, which
 * it does once for each, by the pointer that it was given: what is behind
 * that is more than this. */
struct ctoffload_op {
    uint32_t size;
    uint32_t kind;                      /* enum ctoffload_op_kind. */
    uint8_t cookie[16];                 /* Marks the rule. */
    uint64_t epoch;                     /* Of its connection: part of that. */
    uint64_t rule;                      /* DELETE, ESTABLISHED: as the ADD was
                                         * completed with. */
    const struct ctoffload_flow *flow;  /* ADD: as long as the operation. */
};

/* [any] Completes an operation with success; 'op' is gone.  Of an ADD 'rule'
 * names the rule, unique on the port while it exists, and 'in_hw' tells whether the
 * NIC has it: 1, 0, or -1 for "not known".  Ignored for the others. */
void ctoffload_op_done(struct ctoffload_op *op, uint64_t rule, int in_hw);

/* [any] Completes it with a refusal: a negative errno, or an enum
 * ctoffload_reason; with words, which may be NULL.  'op' is gone. */
void ctoffload_op_refuse(struct ctoffload_op *op, int why, const char *words);

/* One rule, as a sweep finds it. */
struct ctoffload_report {
    uint32_t size;
    int32_t in_hw;                      /* 1, 0, -1. */
    uint8_t cookie[16];                 /* As it was added with. */
    uint64_t rule;
    uint64_t packets, bytes;            /* Since it was installed. */
};

typedef void ctoffload_report_fn(void *arg, const struct ctoffload_report *);

/* A kind of backend.  Callbacks that return 'int' return 0, a negative errno,
 * or (where it is said) an enum ctoffload_reason; words for it may be said by
 * ctoffload_say() in the callback. */
struct ctoffload_class {
    uint32_t size;
    uint32_t reserved;
    const char *name;           /* Unique within an engine.  Copied. */
    void *ctx;                  /* Of the three below; must outlive the class. */

    /* Once, at registration: on the thread that registers.  May be NULL. */
    int (*init)(void *ctx);

    /* Once, when the class is unregistered or its engine is freed after init()
     * succeeded; nothing is bound to it then.  May be NULL. */
    void (*deinit)(void *ctx);

    /* Makes a provider for this port, if the class can serve it: '*provider' is
     * the first argument of all below.  -EOPNOTSUPP (and -ENODEV): it cannot;
     * any other errno: it failed.  The next class is asked then, and nothing
     * is left behind.  On the thread that adds the port. */
    int (*bind)(void *ctx, const struct ctoffload_netdev *, void **provider);

    /* Whether such a flow could be offloaded at all.  Cheap: no lock, no
     * system call.  ON ANY THREAD, a packet thread too, at the same time as
     * all others.  Returns 0, an errno, or a reason.  NULL: every flow of
     * CTOFFLOAD_FORWARD. */
    int (*can_offload)(void *provider, const struct ctoffload_flow *);

    /* Carries out 'n' operations, which are the provider's from here on; the
     * array is the caller's.  It may complete them before it returns or
     * later, on any thread, in any order; operations of one 'arriving'
     * tuple take effect in the order of their submission.  n == 0 is an
     * occasion to put in order what is broken.  On the port's thread, one
     * call at a time; may block. */
    void (*submit)(void *provider, struct ctoffload_op *const ops[], size_t n);

    /* Calls 'report' with 'arg' for every rule.  On the sweep's thread, at
     * the same time as 'submit'; may block. */
    int (*usage)(void *provider, ctoffload_report_fn *report, void *arg);

    /* Removes every rule; '*removed': how many.  Every operation has been
     * completed by then.  On the port's thread. */
    int (*flush)(void *provider, uint64_t *removed);

    /* The last call: removes what is left, and frees the provider.  On the port's
     * thread.  Operations that were not completed by then still have to be,
     * with ctoffload_op_refuse(op, CTOFFLOAD_NETDEV_GONE, NULL). */
    int (*release)(void *provider);
};

/* [admin] Registers a class, behind those that there are.  -EEXIST: one of this
 * name is there.  What init() returned, if that failed. */
int ctoffload_register(struct ctoffload *, const struct ctoffload_class *);

/* [admin] -EBUSY: a port is bound to it.  -ENOENT. */
int ctoffload_unregister(struct ctoffload *, const char *name);

/* [callback] Words for what this callback is about to return, kept and shown
 * with the refusal.  Copied. */
void ctoffload_say(const char *words);

/* ---- for every packet ---- */

/* [any] Used by ctoffload_is_decided(). */
bool ctoffload_is_decided_further(uint32_t generation,
                                  const struct ctoffload_conn *,
                                  uint32_t direction);

/* [worker] Whether a packet of this direction on this port needs nothing more:
 * no ctoffload_conn_add(), no ctoffload_conn_seen().  One atomic load where the
 * port was the first to see the direction; no lock, no write, no call.  ('port'
 * stays in a register if it is a copy, whose address no call was given.) */
static inline bool
ctoffload_is_decided(const struct ctoffload_port *port,
                     const struct ctoffload_conn *conn,
                     enum ctoffload_direction direction)
{
    uint64_t word = __atomic_load_n(&conn->words[direction], __ATOMIC_ACQUIRE);

    if (__builtin_expect((uint32_t) word == port->generation
                         && (word & UINT64_C(0x700000000)), 1)) {
        return true;
    }
    return ctoffload_is_decided_further(port->generation, conn,
                                        (uint32_t) direction);
}

#ifdef __cplusplus
}
#endif

#endif /* ctoffload.h */
