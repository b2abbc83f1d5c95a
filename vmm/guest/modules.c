/* Kernel modules on demand. The kernel asks for one by running a program (kernel.modprobe: Documentation/admin-guide/sysctl/kernel.rst), as
   root and outside of the application's namespaces. Nobody may have one unless the image has all capabilities: then that program is this
   binary, which leaves it to the image's modprobe, where there is one, and else reads /lib/modules itself (modules.dep(5)). */
#define _GNU_SOURCE
#include "modules.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#ifndef ROOT
#define ROOT "/lib/modules"
#endif
#define DEPTH_MAX 32
#define IMAGES_OWN "/sbin/modprobe"

/* Before the image's disk is the root: what it calls modprobe is never run for an image that has not all capabilities. */
void modules_prepare(void) { put("/proc/sys/kernel/modprobe", "\n"); }

void modules_allow(int all_capabilities)
{
    if (all_capabilities) put("/proc/sys/kernel/modprobe", "/proc/1/exe\n");
    else put("/proc/sys/kernel/modules_disabled", "1\n");
}

static void normalize(char *name)
{
    int in_brackets = 0;
    for (; *name; name++) {
        if (*name == '[') in_brackets = 1;
        else if (*name == ']') in_brackets = 0;
        else if (*name == '-' && !in_brackets) *name = '_';
    }
}

static FILE *listing(const char *name)
{
    struct utsname machine;
    char path[PATH_MAX];
    uname(&machine);
    snprintf(path, sizeof path, ROOT "/%s/%s", machine.release, name);
    return fopen(path, "re");
}

/* The module's name: its file's without the end. */
static void name_of(const char *file, size_t length, char name[NAME_MAX + 1])
{
    const char *slash = memrchr(file, '/', length);
    size_t skipped = slash ? (size_t)(slash + 1 - file) : 0;
    snprintf(name, NAME_MAX + 1, "%.*s", (int)(length - skipped), file + skipped);
    name[strcspn(name, ".")] = 0;
    normalize(name);
}

static int insert(const char *file)
{
    struct utsname machine;
    char path[PATH_MAX];
    uname(&machine);
    snprintf(path, sizeof path, ROOT "/%s/%s", machine.release, file);
    int module = open(path, O_RDONLY | O_CLOEXEC);
    int result = module < 0 ? -1 : (int)syscall(SYS_finit_module, module, "", 0);
    if (result && errno == EEXIST) result = 0;
    if (module >= 0) close(module);
    return result;
}

static int load(const char *name, int depth);

/* What modules.softdep(5) names before or after a module, which may be missing. */
static void load_soft(const char *name, const char *when, int depth)
{
    FILE *file = listing("modules.softdep");
    char *line = NULL, *rest;
    size_t size = 0;
    while (file && getline(&line, &size, file) > 0) {
        if (strncmp(line, "softdep ", 8)) continue;
        char *word = strtok_r(line + 8, " \n", &rest);
        if (!word) continue;
        normalize(word);
        if (strcmp(word, name)) continue;
        int is_meant = 0;
        while ((word = strtok_r(NULL, " \n", &rest))) {
            if (word[strlen(word) - 1] == ':') is_meant = !strcmp(word, when);
            else if (is_meant) load(word, depth + 1);
        }
    }
    free(line);
    if (file) fclose(file);
}

/* A line of modules.dep: the module's file, a colon, and those that it needs, which need each other from the last one on. */
static int load_line(char *line, const char *name, int depth)
{
    char loaded[PATH_MAX], *colon = strchr(line, ':');
    snprintf(loaded, sizeof loaded, "/sys/module/%s/initstate", name);
    if (!access(loaded, F_OK)) return 0;
    load_soft(name, "pre:", depth);
    char *needed[128], *rest;
    size_t count = 0;
    *colon = 0;
    for (char *word = strtok_r(colon + 1, " \n", &rest); word && count < 128; word = strtok_r(NULL, " \n", &rest)) needed[count++] = word;
    while (count) {
        char other[NAME_MAX + 1];
        count--;
        name_of(needed[count], strlen(needed[count]), other);
        if (load(other, depth + 1)) return -1;
    }
    int result = insert(line);
    load_soft(name, "post:", depth);
    return result;
}

/* By its own name. 1 where there is none of this name. */
static int load_named(const char *name, int depth)
{
    FILE *file = listing("modules.dep");
    char *line = NULL, found[NAME_MAX + 1];
    size_t size = 0;
    int result = 1;
    while (file && result > 0 && getline(&line, &size, file) > 0) {
        char *colon = strchr(line, ':');
        if (!colon) continue;
        name_of(line, (size_t)(colon - line), found);
        if (!strcmp(found, name)) result = load_line(line, name, depth);
    }
    free(line);
    if (file) fclose(file);
    return result;
}

/* By an alias, which is a pattern and may be several modules'. */
static int load_alias(const char *list, const char *name, int depth)
{
    FILE *file = listing(list);
    char *line = NULL;
    size_t size = 0;
    int result = -1;
    while (file && getline(&line, &size, file) > 0) {
        char *rest, *word = strtok_r(line, " \n", &rest), *pattern = strtok_r(NULL, " \n", &rest), *module = strtok_r(NULL, " \n", &rest);
        if (!module || strcmp(word, "alias")) continue;
        normalize(pattern);
        size_t plain = strcspn(pattern, "*?[\\");
        if (strncmp(pattern, name, plain) || fnmatch(pattern, name, 0)) continue;
        if (!load(module, depth + 1)) result = 0;
    }
    free(line);
    if (file) fclose(file);
    return result;
}

static int load(const char *asked, int depth)
{
    char name[NAME_MAX + 1];
    snprintf(name, sizeof name, "%s", asked);
    normalize(name);
    if (depth > DEPTH_MAX) return -1;
    int result = load_named(name, depth);
    if (result > 0) result = load_alias(strncmp(name, "symbol:", 7) ? "modules.alias" : "modules.symbols", name, depth);
    return result;
}

/* The kernel's call: PROGRAM -q -- NAME. Returns the exit code. */
int modules_load(char **arguments)
{
    char *last = NULL;
    for (char **one = arguments + 1; *one; one++) last = *one;
    arguments[0] = IMAGES_OWN;
    execv(IMAGES_OWN, arguments); /* its owner may have set options or names in /etc/modprobe.d */
    return last && !load(last, 0) ? 0 : 1;
}
