/* SPDX-License-Identifier: Apache-2.0
 *
 * A provider class in C: a NIC in memory, that counts, fails on demand, and
 * aborts where the engine breaks a promise. */

#ifndef NIC_H
#define NIC_H 1

#include "ctoffload.h"

/* What tuples of the test are made of: the connection's index, in the address. */
#define NIC_INDEX(FLOW)                                                 \
    ((uint32_t) (FLOW)->arriving.src[1] << 16                           \
     | (uint32_t) (FLOW)->arriving.src[2] << 8 | (FLOW)->arriving.src[3])

struct nic_counts {
    unsigned long long adds, refused, deletes, replies;   /* Operations. */
    unsigned long long rules;                             /* Now. */
    unsigned long long bound, released;                   /* Ports. */
    unsigned long long submits;                           /* Not empty. */
};

struct nic_rule {
    uint32_t port;
    uint32_t index;             /* Of NIC_INDEX. */
    uint64_t epoch;
    unsigned direction;
};

/* How it fails. */
struct nic_faults {
    unsigned busy_every;        /* An add of so many gets -EAGAIN; 0: none. */
    unsigned refuse_every;      /* -EIO. */
    unsigned capacity;          /* Rules per port; 0: as many as are wanted. */
    unsigned zone;              /* No connection of this zone; 0: of any. */
};

struct nic *nic_create(void);
void nic_destroy(struct nic *);         /* After the class is unregistered. */
void nic_set_faults(struct nic *, struct nic_faults);
void nic_register(struct nic *, struct ctoffload *);

/* As a class of this name and init(), which fails with this errno. */
void nic_register_as(struct nic *, struct ctoffload *, const char *name,
                     int (*init)(void *), void *ctx, int error);

struct nic_counts nic_counts(struct nic *, uint32_t port); /* 0: of all. */

/* Packets hit every rule: what a sweep then finds. */
void nic_hit_all(struct nic *);

/* Every rule, under the lock of the NIC. */
void nic_for_each(struct nic *, void (*)(void *, const struct nic_rule *),
                  void *);

#endif /* nic.h */
