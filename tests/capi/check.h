/* SPDX-License-Identifier: Apache-2.0
 *
 * What the tests of the C interface have in common. */

#ifndef CHECK_H
#define CHECK_H 1

#include <stdio.h>
#include <stdlib.h>

#include "ctoffload.h"

/* Also where NDEBUG is set: it is what the test is for. */
#define CHECK(CONDITION)                                                \
    do {                                                                \
        if (!(CONDITION)) {                                             \
            fprintf(stderr, "%s:%d: does not hold: %s (last error: %s)\n", \
                    __FILE__, __LINE__, #CONDITION, ctoffload_last_error()); \
            abort();                                                    \
        }                                                               \
    } while (0)

/* A number, and both sides of it where it is another. */
#define CHECK_IS(ACTUAL, WANTED)                                        \
    do {                                                                \
        long long actual_ = (long long) (ACTUAL);                       \
        long long wanted_ = (long long) (WANTED);                       \
        if (actual_ != wanted_) {                                       \
            fprintf(stderr, "%s:%d: %s is %lld, not %lld (last error: %s)\n", \
                    __FILE__, __LINE__, #ACTUAL, actual_, wanted_,      \
                    ctoffload_last_error());                            \
            abort();                                                    \
        }                                                               \
    } while (0)

/* What the engine promises about the order of callbacks, said to a sanitizer
 * that does not see how it keeps that: what has come before HAPPENS_BEFORE(KEY)
 * comes before what follows on HAPPENS_AFTER(KEY).  Of anything that was not
 * promised, ThreadSanitizer still has to be convinced. */
#ifdef __SANITIZE_THREAD__
void __tsan_acquire(void *);
void __tsan_release(void *);
#define HAPPENS_BEFORE(KEY) __tsan_release((void *) (KEY))
#define HAPPENS_AFTER(KEY) __tsan_acquire((void *) (KEY))
#else
#define HAPPENS_BEFORE(KEY) ((void) (KEY))
#define HAPPENS_AFTER(KEY) ((void) (KEY))
#endif

#endif /* check.h */
