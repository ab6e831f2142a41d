/* SPDX-License-Identifier: Apache-2.0
 *
 * A plugin that uses the library, and is unloaded as soon as it has closed its
 * engine: threads of the library may end a little later than that.
 *
 *     unload PLUGIN    its main() is called, and it is unloaded, three times */

#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

/* For what check.h says: this program is not linked to the library. */
const char *
ctoffload_last_error(void)
{
    return "not linked";
}

/* Whether a file of this name is mapped. */
static int
is_mapped(const char *name)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[4096];
    int found = 0;

    CHECK(maps != NULL);
    while (fgets(line, sizeof line, maps)) {
        found |= strstr(line, name) != NULL;
    }
    fclose(maps);
    return found;
}

static int (*plugin_main)(int, char **);
static char *plugin_args[] = { "plugin", NULL };

/* In a thread that has ended when the plugin goes: what a living one still has
 * to destroy in a library keeps it loaded. */
static void *
run(void *result)
{
    *(int *) result = plugin_main(1, plugin_args);
    return NULL;
}

int
main(int argc, char **argv)
{
    CHECK_IS(argc, 2);
    for (int round = 0; round < 3; round++) {
        void *plugin = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        int result = -1;
        pthread_t thread;

        if (!plugin) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        CHECK(is_mapped(argv[1]));
        *(void **) &plugin_main = dlsym(plugin, "main");
        CHECK(plugin_main != NULL);
        CHECK_IS(pthread_create(&thread, NULL, run, &result), 0);
        CHECK_IS(pthread_join(thread, NULL), 0);
        CHECK_IS(result, 0);
        CHECK_IS(dlclose(plugin), 0);
        CHECK(!is_mapped(argv[1]));
        /* The library stays, for the threads' sake. */
        CHECK(is_mapped("libctoffload.so"));
    }
    /* Longer than a thread of a port stays where there is nothing to do. */
    sleep(3);
    CHECK(is_mapped("libctoffload.so"));
    return 0;
}
