/* SPDX-License-Identifier: Apache-2.0
 *
 * What is wrong is refused, with an errno and with words, and changes
 * nothing; what is old or new is understood. */

#include <errno.h>
#include <string.h>

#include "check.h"
#include "nic.h"

static struct ctoffload *engine;
static struct nic *nic;

/* The last call failed like this, and said why. */
static void
check_fails(int result, int error, const char *words)
{
    CHECK_IS(result, -error);
    if (!strstr(ctoffload_last_error(), words)) {
        fprintf(stderr, "'%s' is not in '%s'\n", words, ctoffload_last_error());
        abort();
    }
}

static struct ctoffload_tuple
tuple(unsigned index)
{
    return (struct ctoffload_tuple) {
        .family = 4, .protocol = 6, .sport = 1, .dport = 2,
        .src = { 10, 0, 0, (uint8_t) index }, .dst = { 192, 0, 2, 1 },
    };
}

static struct ctoffload_conn *
conn_new(unsigned index)
{
    struct ctoffload_new_conn new = {
        .size = sizeof new, .original = tuple(index), .reply = tuple(200),
    };
    struct ctoffload_conn *conn = NULL;

    CHECK_IS(ctoffload_conn_create(engine, &new, &conn), 0);
    return conn;
}

static void
test_words(void)
{
    CHECK_IS(ctoffload_abi(), CTOFFLOAD_ABI);
    CHECK(!strcmp(ctoffload_strerror(-ENODEV), ctoffload_strerror(ENODEV)));
    CHECK(!strcmp(ctoffload_strerror(0), "no error"));
    CHECK(strlen(ctoffload_strerror(123456)) > 0);
    CHECK(!strcmp(ctoffload_reason_name(CTOFFLOAD_TABLE_FULL), "table-full"));
    CHECK(!strcmp(ctoffload_reason_name(CTOFFLOAD_NO_PROVIDER), "no-provider"));
    CHECK(!strcmp(ctoffload_reason_name(4711), "unknown"));
}

static void
test_engine(void)
{
    struct ctoffload_config config = { .size = sizeof config };
    struct ctoffload *other = NULL;

    check_fails(ctoffload_open(NULL, NULL, &other), EINVAL, "config is NULL");
    check_fails(ctoffload_open(&config, NULL, NULL), EINVAL, "no place");
    config.size = 3;
    check_fails(ctoffload_open(&config, NULL, &other), EINVAL, "its size is 3");
    CHECK(!other);

    /* Of a later version: what it says more is refused, unless that is nothing. */
    struct {
        struct ctoffload_config config;
        uint64_t more;
    } later = { .config = { .size = sizeof later, .instance = 7 }, .more = 1 };
    check_fails(ctoffload_open(&later.config, NULL, &other), E2BIG, "config");
    later.more = 0;
    CHECK_IS(ctoffload_open(&later.config, NULL, &other), 0);
    CHECK_IS(ctoffload_close(other), 0);
    check_fails(ctoffload_close(NULL), EINVAL, "engine is NULL");
}

static int
failing_init(void *error)
{
    ctoffload_say("there is no NIC here");
    return *(int *) error;
}

static void
test_classes(void)
{
    struct ctoffload_class class = { .size = sizeof class, .name = "half" };
    int error = -ENXIO;

    check_fails(ctoffload_register(engine, &class), EINVAL, "needs bind");
    check_fails(ctoffload_register(engine, NULL), EINVAL, "class is NULL");
    check_fails(ctoffload_unregister(engine, "half"), ENOENT, "half");
    check_fails(ctoffload_unregister(engine, NULL), EINVAL, "NULL");

    /* The NIC's own, once more; and one whose init() fails. */
    nic_register_as(nic, engine, "nic", NULL, NULL, EEXIST);
    nic_register_as(nic, engine, "broken", failing_init, &error, ENXIO);
    CHECK(strstr(ctoffload_last_error(), "there is no NIC here"));
}

static void
test_ports(void)
{
    struct ctoffload_new_port new = { .size = sizeof new, .id = 0 };
    const char *nobody[] = { "nobody", NULL };
    const char *none[] = { "none", "nic", NULL };
    struct ctoffload_port_stats stats = { .size = sizeof stats };
    struct ctoffload_port port;
    struct ctoffload_worker *worker;
    uint32_t first, second;

    check_fails(ctoffload_port_add(engine, &new, NULL), EINVAL, "no port");
    new.id = 7;
    new.hw_flags = 9;
    check_fails(ctoffload_port_add(engine, &new, NULL), EINVAL, "9");
    new.hw_flags = 0;
    new.providers = nobody;
    check_fails(ctoffload_port_add(engine, &new, NULL), ENOENT, "nobody");
    check_fails(ctoffload_port_stats(engine, 7, &stats), ENODEV, "7");
    check_fails(ctoffload_port_del(engine, 7, NULL), ENODEV, "7");

    new.providers = none;
    CHECK_IS(ctoffload_port_add(engine, &new, &first), 0);
    CHECK_IS(ctoffload_port_stats(engine, 7, &stats), 0);
    CHECK_IS(stats.bound, 0);
    CHECK_IS(ctoffload_port_del(engine, 7, NULL), 0);

    /* A class declines, with its words; that is no error. */
    new.providers = NULL;
    new.name = "foreign";
    CHECK_IS(ctoffload_port_add(engine, &new, &second), 0);
    CHECK(second != first);
    CHECK_IS(ctoffload_worker_create(engine, &worker), 0);
    CHECK_IS(ctoffload_worker_port(worker, 7, &port), 0);
    CHECK(port.generation == second && !port.bound && port.id == 7);
    check_fails(ctoffload_worker_port(worker, 8, &port), ENODEV, "8");
    CHECK(!port.bound && !port.generation);
    check_fails(ctoffload_worker_port(worker, 0, &port), ENODEV, "0");
    check_fails(ctoffload_worker_port(NULL, 7, &port), EINVAL, "worker is NULL");
    check_fails(ctoffload_close(engine), EBUSY, "1 workers");
    ctoffload_worker_destroy(worker);
    ctoffload_worker_destroy(NULL);
    CHECK_IS(ctoffload_port_del(engine, 7, NULL), 0);
}

static void
test_conns(void)
{
    struct ctoffload_new_conn new = {
        .size = sizeof new, .original = tuple(1), .reply = tuple(2),
    };
    struct ctoffload_conn *one = NULL, *same = NULL, *none[1] = { NULL };
    struct ctoffload_use use = { .size = sizeof use };
    uint64_t rules = 99;

    new.original.family = 5;
    check_fails(ctoffload_conn_create(engine, &new, &one), EINVAL, "family 5");
    new.original.family = 4;
    new.reply.protocol = 1;
    check_fails(ctoffload_conn_create(engine, &new, &one), EINVAL, "protocol 1");
    new.reply.protocol = 6;
    check_fails(ctoffload_conn_create(engine, &new, NULL), EINVAL, "no place");
    CHECK(!one);
    CHECK_IS(ctoffload_conn_create(engine, &new, &one), 0);
    CHECK_IS(ctoffload_conn_create(engine, &new, &same), 0);
    CHECK(one == same && ctoffload_conn_epoch(one));
    ctoffload_conn_unref(same);
    check_fails(ctoffload_conn_del(engine, none, 1, NULL), EINVAL, "NULL");
    check_fails(ctoffload_conn_del(engine, NULL, 1, NULL), EINVAL, "NULL");
    check_fails(ctoffload_conn_update(engine, &use, 1), EINVAL, "NULL");
    CHECK_IS(ctoffload_conn_del(engine, NULL, 0, &rules), 0);
    CHECK_IS(rules, 0);
    use.conn = one;
    use.usage = 77;
    CHECK_IS(ctoffload_conn_update(engine, &use, 1), 0);
    CHECK_IS(use.usage, CTOFFLOAD_NOT_OFFLOADED);
    CHECK_IS(ctoffload_extended_expiry(5, &use, 1000, 10), 5);
    CHECK_IS(ctoffload_extended_expiry(5, NULL, 1000, 10), 5);
    use.usage = CTOFFLOAD_UNKNOWN;
    CHECK_IS(ctoffload_extended_expiry(5, &use, 1000, 10), 1010);
    CHECK_IS(ctoffload_conn_del(engine, &one, 1, &rules), 0);

    /* The same tuple is another connection now. */
    uint64_t epoch = ctoffload_conn_epoch(one);
    CHECK_IS(ctoffload_conn_create(engine, &new, &same), 0);
    CHECK(same != one && ctoffload_conn_epoch(same) != epoch);
    ctoffload_conn_ref(same);
    ctoffload_conn_unref(same);
    CHECK_IS(ctoffload_conn_retract(engine, &same, 1, NULL), 0);
    CHECK_IS(ctoffload_conn_del(engine, &same, 1, NULL), 0);
    ctoffload_conn_unref(one);
    ctoffload_conn_unref(same);
    ctoffload_conn_unref(NULL);
}

/* Waits until the slot is in this state. */
static struct ctoffload_slot_state
state_of(struct ctoffload_conn *conn, unsigned direction, uint32_t port,
         uint32_t state)
{
    struct ctoffload_slot slot = { .conn = conn, .direction = direction };
    struct ctoffload_slot_state now = { .size = sizeof now };

    for (uint64_t end = ctoffload_now_ms(engine) + 60000;;) {
        CHECK_IS(ctoffload_slot_state(engine, &slot, port, &now), 0);
        if (now.state == state) {
            return now;
        }
        CHECK(ctoffload_now_ms(engine) < end);
    }
}

static void
test_offers(void)
{
    struct ctoffload_new_port new = { .size = sizeof new, .id = 1 };
    struct ctoffload_path path = {
        .size = sizeof path, .kind = CTOFFLOAD_FORWARD, .egress = 2,
        .ingress_mtu = 1500, .mtu = 1500,
    };
    struct ctoffload_conn *conn = conn_new(9), *other = conn_new(10);
    struct ctoffload_offer offers[2] = {
        { .size = sizeof offers[0], .conn = conn, .path = &path },
        { .size = sizeof offers[0], .conn = other, .path = &path },
    };
    struct ctoffload_slot slot = { .conn = conn, .direction = 2 };
    struct ctoffload_worker *worker;
    struct ctoffload_port port, old;

    CHECK_IS(ctoffload_port_add(engine, &new, NULL), 0);
    new.id = 2;
    CHECK_IS(ctoffload_port_add(engine, &new, NULL), 0);
    CHECK_IS(ctoffload_worker_create(engine, &worker), 0);
    CHECK_IS(ctoffload_worker_port(worker, 1, &port), 0);

    /* One that cannot be: none is made. */
    offers[1].direction = 2;
    check_fails(ctoffload_conn_add(worker, &port, offers, 2), EINVAL, "direction");
    offers[1].direction = 0;
    offers[1].path = NULL;
    check_fails(ctoffload_conn_add(worker, &port, offers, 2), EINVAL, "path is NULL");
    offers[1].path = &path;
    offers[1].conn = NULL;
    check_fails(ctoffload_conn_add(worker, &port, offers, 2), EINVAL, "connection");
    offers[1].conn = other;
    for (unsigned wrong = 0; wrong < 5; wrong++) {
        struct ctoffload_path good = path;

        switch (wrong) {
        case 0: path.kind = 9; break;
                case 1: path.vlan_out = 4095; break;
        case 2: path.mtu = 0; break;
        case 3: path.egress = 0; break;
        case 4: path.kind = CTOFFLOAD_REFUSED; break;
        }
        check_fails(ctoffload_conn_seen(worker, &port, offers, 1), EINVAL, "");
        path = good;
    }
    path.flags = 64;            /* Of a later version. */
    check_fails(ctoffload_conn_seen(worker, &port, offers, 1), E2BIG, "path");
    path.flags = 0;
    offers[1].size += 8;        /* Not as long as its place is. */
    check_fails(ctoffload_conn_seen(worker, &port, offers, 2), EINVAL, "long");
    offers[1].size -= 8;
    CHECK(!ctoffload_is_decided(&port, conn, CTOFFLOAD_ORIGINAL));
    check_fails(ctoffload_conn_established(worker, &port, &slot, 1), EINVAL,
                "direction");
    CHECK_IS(nic_counts(nic, 0).submits, 0);

    /* Refused by the caller itself; by the provider, with its words; taken. */
    path.kind = CTOFFLOAD_REFUSED;
    path.reason = CTOFFLOAD_NOT_ADMITTED;
    check_fails(ctoffload_can_offload(worker, &port, &offers[1]), EOPNOTSUPP,
                "not-admitted");
    CHECK_IS(ctoffload_conn_add(worker, &port, &offers[1], 1), 0);
    CHECK_IS(offers[1].result, CTOFFLOAD_QUEUED);
    CHECK_IS(state_of(other, 0, 1, CTOFFLOAD_REJECTED).reason,
             CTOFFLOAD_NOT_ADMITTED);
    CHECK(ctoffload_is_decided(&port, other, CTOFFLOAD_ORIGINAL));
    path.kind = CTOFFLOAD_RESOLVE;
    check_fails(ctoffload_can_offload(worker, &port, offers), EINVAL, "not known");
    path.kind = CTOFFLOAD_FORWARD;
    CHECK_IS(ctoffload_can_offload(worker, &port, offers), 0);
    CHECK_IS(ctoffload_conn_add(worker, &port, offers, 2), 0);
    CHECK_IS(offers[0].result, CTOFFLOAD_QUEUED);
    CHECK_IS(offers[1].result, CTOFFLOAD_DECIDED);
    struct ctoffload_slot_state installed
        = state_of(conn, 0, 1, CTOFFLOAD_INSTALLED);
    CHECK(installed.in_hw == 1 && installed.rule && !installed.reason);

    CHECK(ctoffload_is_decided(&port, conn, CTOFFLOAD_ORIGINAL));
    CHECK(!ctoffload_is_decided(&port, conn, CTOFFLOAD_REPLY));

    /* On a second port it is a slot of its own, which the header asks for behind
     * the first. */
    CHECK_IS(ctoffload_worker_port(worker, 2, &old), 0);
    CHECK(!ctoffload_is_decided(&old, conn, CTOFFLOAD_ORIGINAL));
    path.egress = 1;            /* It leads into the other port. */
    CHECK_IS(ctoffload_conn_seen(worker, &old, offers, 1), 0);
    CHECK_IS(offers[0].result, CTOFFLOAD_QUEUED);
    CHECK(ctoffload_is_decided(&old, conn, CTOFFLOAD_ORIGINAL));
    CHECK(!ctoffload_is_decided(&old, conn, CTOFFLOAD_REPLY));
    state_of(conn, 0, 2, CTOFFLOAD_INSTALLED);

    /* A port that goes takes what leads into it along; what is kept of it for
     * too long does no harm. */
    struct ctoffload_port_deleted deleted = { .size = sizeof deleted };
    ctoffload_worker_offline(worker);
    CHECK_IS(ctoffload_port_del(engine, 1, &deleted), 0);
    CHECK(deleted.flushed == 1 && deleted.retracted == 1 && !deleted.faults);
    ctoffload_worker_online(worker);
    state_of(conn, 0, 2, CTOFFLOAD_EMPTY);
    check_fails(ctoffload_conn_add(worker, &port, offers, 1), ESTALE, "1");
    check_fails(ctoffload_can_offload(worker, &port, offers), ESTALE, "1");
    new.id = 1;                 /* Another port of the same number. */
    ctoffload_worker_offline(worker);
    CHECK_IS(ctoffload_port_add(engine, &new, NULL), 0);
    ctoffload_worker_online(worker);
    check_fails(ctoffload_conn_add(worker, &port, offers, 1), ESTALE, "1");
    CHECK_IS(ctoffload_worker_port(worker, 1, &port), 0);
    CHECK(!ctoffload_is_decided(&port, conn, CTOFFLOAD_ORIGINAL));
    ctoffload_worker_offline(worker);
    CHECK_IS(ctoffload_port_del(engine, 1, NULL), 0);
    ctoffload_worker_online(worker);
    CHECK_IS(ctoffload_worker_port(worker, 1, &port), -ENODEV);
    CHECK(!ctoffload_is_decided(&port, conn, CTOFFLOAD_ORIGINAL));

    /* An end is one for all. */
    CHECK_IS(ctoffload_conn_del(engine, &conn, 1, NULL), 0);
    CHECK_IS(ctoffload_conn_add(worker, &old, offers, 1), 0);
    CHECK_IS(offers[0].result, CTOFFLOAD_NOT_NOW);
    CHECK_IS(offers[0].reason, CTOFFLOAD_CONN_STATE);
    ctoffload_worker_destroy(worker);
    CHECK_IS(ctoffload_conn_del(engine, &other, 1, NULL), 0);
    ctoffload_conn_unref(conn);
    ctoffload_conn_unref(other);
    check_fails(ctoffload_unregister(engine, "nic"), EBUSY, "nic");
    CHECK_IS(ctoffload_port_del(engine, 2, NULL), 0);
}

static void
test_flush(void)
{
    struct ctoffload_filter filter = { .size = sizeof filter, .fields = 8 };

    check_fails(ctoffload_flush(engine, &filter, NULL), E2BIG, "filter");
    filter.fields = CTOFFLOAD_FILTER_PORT;
    filter.port = 77;
    check_fails(ctoffload_flush(engine, &filter, NULL), ENODEV, "77");
    filter.fields = CTOFFLOAD_FILTER_TUPLE;
    check_fails(ctoffload_flush(engine, &filter, NULL), EINVAL, "protocol 0");
    CHECK_IS(ctoffload_flush(engine, NULL, NULL), 0);
    CHECK_IS(ctoffload_sweep(engine, NULL), 0);
}

/* ---- a datapath that is asked ---- */

struct asked {
    _Atomic unsigned resolved, rearmed, installed, deleted;
};

static int
resolve(void *asked_, const struct ctoffload_sight *sight,
        const struct ctoffload_path *hint, struct ctoffload_path *path)
{
    struct asked *asked = asked_;

    CHECK(sight->conn && sight->port == 1 && sight->generation);
    CHECK(hint->kind == CTOFFLOAD_RESOLVE && hint->mark == 42);
    CHECK_IS(path->size, sizeof *path);
    if (asked->resolved++ == 0) {
        ctoffload_say("no neighbour");
        return CTOFFLOAD_NO_ROUTE;
    }
    path->kind = CTOFFLOAD_FORWARD;
    path->egress = hint->egress;
    path->ingress_mtu = path->mtu = 1500;
    return 0;
}

static void
rearm(void *asked_, const struct ctoffload_sight *sights, size_t n)
{
    struct asked *asked = asked_;

    for (size_t i = 0; i < n; i++) {
        CHECK(sights[i].conn && sights[i].direction == CTOFFLOAD_REPLY);
    }
    asked->rearmed += n;
}

static void
slot_changed(void *asked_, const struct ctoffload_sight *sight, uint32_t state,
             uint32_t reason)
{
    struct asked *asked = asked_;

    CHECK(sight->conn);
    CHECK_IS(reason, state == CTOFFLOAD_REJECTED ? CTOFFLOAD_NO_ROUTE : 0);
    asked->installed += state == CTOFFLOAD_INSTALLED;
    asked->deleted += state == CTOFFLOAD_EMPTY;
}

static void
test_datapath(void)
{
    struct asked asked = { 0 };
    struct ctoffload_datapath datapath = {
        .size = sizeof datapath, .ctx = &asked, .resolve = resolve,
        .rearm = rearm, .slot_changed = slot_changed,
    };
    struct ctoffload_config config = { .size = sizeof config };
    struct ctoffload_new_port new = { .size = sizeof new, .id = 1 };
    struct ctoffload_path path = {
        .size = sizeof path, .kind = CTOFFLOAD_RESOLVE, .egress = 5, .mark = 42,
    };
    struct ctoffload *before = engine;
    struct nic *nic_before = nic;
    struct ctoffload_worker *worker;
    struct ctoffload_port port;
    struct ctoffload_conn *conn;

    CHECK_IS(ctoffload_open(&config, &datapath, &engine), 0);
    nic = nic_create();
    nic_register(nic, engine);
    CHECK_IS(ctoffload_port_add(engine, &new, NULL), 0);
    CHECK_IS(ctoffload_worker_create(engine, &worker), 0);
    CHECK_IS(ctoffload_worker_port(worker, 1, &port), 0);
    conn = conn_new(1);
    struct ctoffload_offer offer = {
        .size = sizeof offer, .direction = CTOFFLOAD_REPLY, .conn = conn,
        .path = &path,
    };
    CHECK_IS(ctoffload_conn_add(worker, &port, &offer, 1), 0);
    /* No route; then, after a pause, it may be offered again. */
    state_of(conn, 1, 1, CTOFFLOAD_REJECTED);
    state_of(conn, 1, 1, CTOFFLOAD_EMPTY);
    CHECK_IS(ctoffload_conn_add(worker, &port, &offer, 1), 0);
    state_of(conn, 1, 1, CTOFFLOAD_INSTALLED);
    CHECK_IS(ctoffload_conn_del(engine, &conn, 1, NULL), 0);
    state_of(conn, 1, 1, CTOFFLOAD_EMPTY);
    ctoffload_conn_unref(conn);
    ctoffload_worker_destroy(worker);
    CHECK_IS(ctoffload_close(engine), 0);
    CHECK(asked.resolved == 2 && asked.rearmed == 1);
    CHECK(asked.installed == 1 && asked.deleted == 1);
    nic_destroy(nic);
    engine = before;
    nic = nic_before;
}

int
main(void)
{
    struct ctoffload_config config = { .size = sizeof config };

    CHECK_IS(ctoffload_open(&config, NULL, &engine), 0);
    nic = nic_create();
    nic_register(nic, engine);
    test_words();
    test_engine();
    test_classes();
    test_ports();
    test_conns();
    test_offers();
    test_flush();
    test_datapath();
    CHECK_IS(ctoffload_close(engine), 0);
    nic_destroy(nic);
    puts("ok: what is wrong is refused, and changes nothing");
    return 0;
}
