/* What a RUN step would try to leave its build, and a line for each: its name, and "done" or what came of it.
 * Arguments: files that only the builder has, then "--", then NAME=ADDRESS:PORT of what a build must not reach.
 * Nothing it does lasts: tests also run it as the host's root, without the walls. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

static char **files;

static int there(const char *root, const char *file) {
    char path[512];
    snprintf(path, sizeof path, "%s%s", root, file);
    int fd = open(path, O_RDONLY);
    if (fd >= 0) close(fd);
    return fd >= 0;
}

static int any(const char *root) {
    for (char **file = files; *file && strcmp(*file, "--"); file++)
        if (there(root, *file)) return 0;
    errno = ENOENT;
    return -1;
}

static int descriptors(void) {
    char link[64], target[256];
    int kept = -1;
    for (int fd = 0; fd < 1024; fd++) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, target, sizeof target - 1);
        if (n < 0) continue;
        target[n] = 0;
        if (fd > 2 || (strncmp(target, "pipe:", 5) && strcmp(target, "/dev/null"))) kept = 0;
    }
    errno = EBADF;
    return kept;
}

static int chrooted(void) { /* a root that was not pivoted lies below another */
    mkdir("/tmp", 0755);
    mkdir("/tmp/below", 0755);
    if (chroot("/tmp/below")) return -1;
    for (int up = 0; up < 64; up++)
        if (chdir("..")) return -1;
    return chroot(".") ? -1 : any("");
}

static int others(const char *what) {
    DIR *proc = opendir("/proc");
    char root[300];
    for (struct dirent *one; proc && (one = readdir(proc));) {
        snprintf(root, sizeof root, "/proc/%s/%s", one->d_name, what);
        if (one->d_name[0] >= '0' && one->d_name[0] <= '9' && !any(root)) return 0;
    }
    errno = ENOENT;
    return -1;
}
static int roots(void) { return others("root"); }
static int directly(void) { return any(""); }
static int host_processes(void) { /* the tests have one of this name on the host */
    DIR *all = opendir("/proc");
    for (struct dirent *one; all && (one = readdir(all));) {
        char path[300], name[64] = "";
        snprintf(path, sizeof path, "/proc/%s/comm", one->d_name);
        FILE *file = fopen(path, "r");
        if (!file) continue;
        char *read = fgets(name, sizeof name, file);
        fclose(file);
        if (read && !strcmp(name, "torpor-outside\n")) return 0;
    }
    errno = ENOENT;
    return -1;
}

static int capabilities(void) { /* beyond those that Docker gives */
    char line[128];
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (!strncmp(line, "CapEff:", 7)) {
            unsigned long long have = strtoull(line + 7, 0, 16);
            errno = EPERM;
            return have & ~0xa80425fbULL ? 0 : -1;
        }
    return -1;
}
static int unfiltered(void) {
    char line[128];
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (!strncmp(line, "Seccomp:", 8)) {
            errno = EPERM;
            return atoi(line + 8) == 2 ? -1 : 0;
        }
    return -1;
}

static int mounts(void) {
    mkdir("/tmp", 0755);
    mkdir("/tmp/m", 0755);
    return mount("none", "/tmp/m", "tmpfs", 0, 0);
}
static int remounts(void) { return mount("/proc/sys", "/proc/sys", 0, MS_BIND, 0); }
static int users(void) { return unshare(CLONE_NEWUSER | CLONE_NEWNS); }
static int namespaces(void) { return unshare(CLONE_NEWNET); }
static int joins(void) {
    int fd = open("/proc/self/ns/net", O_RDONLY);
    return fd < 0 ? -1 : setns(fd, 0);
}
static int keys(void) { return syscall(SYS_add_key, "user", "torpor-step", "x", 1L, -2L) < 0 ? -1 : 0; } /* of the process, -2 */
static int programs(void) {
    unsigned map[18] = {2, 4, 4, 1}; /* an array of one (bpf(2), BPF_MAP_CREATE) */
    return syscall(SYS_bpf, 0, map, sizeof map) < 0 ? -1 : 0;
}
static int uring(void) {
    char parameters[120] = {0};
    return syscall(SYS_io_uring_setup, 1, parameters) < 0 ? -1 : 0;
}
static int handles(void) {
    struct { struct file_handle head; char rest[128]; } handle = {.head.handle_bytes = 128};
    int id, at = open("/", O_RDONLY | O_DIRECTORY);
    if (name_to_handle_at(AT_FDCWD, "/", &handle.head, &id, 0)) return -1;
    return open_by_handle_at(at, &handle.head, O_RDONLY) < 0 ? -1 : 0;
}
static int device(void) { /* the disk of a loop device */
    unlink("/tmp/loop");
    if (mknod("/tmp/loop", S_IFBLK | 0600, makedev(7, 0))) return -1;
    int fd = open("/tmp/loop", O_RDONLY | O_NONBLOCK);
    unlink("/tmp/loop");
    return fd < 0 ? -1 : 0;
}
static int groups(void) { /* a control group of its own, with limits of its own */
    const char *places[] = {"/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids"};
    char path[128];
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/torpor-step", places[i]);
        if (!mkdir(path, 0755)) return rmdir(path), 0;
    }
    return -1;
}
static int settings(void) { return open("/proc/sys/kernel/core_pattern", O_WRONLY) < 0 ? -1 : 0; }
static int settings_in_sys(void) { return open("/sys/kernel/mm/ksm/run", O_WRONLY) < 0 ? -1 : 0; }
static int lent(void) { return open("/dev/.lent/written", O_WRONLY | O_CREAT, 0600) < 0 ? -1 : (unlink("/dev/.lent/written"), 0); }

static int reach(const char *where) {
    char address[64];
    struct sockaddr_in to = {.sin_family = AF_INET};
    const char *port = strrchr(where, ':');
    snprintf(address, sizeof address, "%.*s", (int)(port - where), where);
    inet_pton(AF_INET, address, &to.sin_addr);
    to.sin_port = htons(atoi(port + 1));
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct timeval wait = {.tv_sec = 3};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait);
    return connect(fd, (struct sockaddr *)&to, sizeof to);
}

static void attempt(const char *name, int (*work)(void), const char *where) {
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        int done = where ? reach(where) : work();
        printf("tried %s: %s\n", name, done ? strerror(errno) : "done");
        fflush(stdout);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status)) printf("tried %s: signal %d\n", name, WTERMSIG(status));
}

int main(int count, char **arguments) {
    static const struct { const char *name; int (*work)(void); } list[] = {
        {"descriptors beyond the three", descriptors}, {"files of the builder", directly}, {"files above its root", chrooted},
        {"files below another's root", roots}, {"the host's processes", host_processes}, {"capabilities beyond Docker's", capabilities},
        {"system calls without a filter", unfiltered}, {"mount", mounts}, {"mount over what is masked", remounts},
        {"a user namespace", users}, {"a network namespace", namespaces}, {"a namespace, entered", joins},
        {"the kernel's keys", keys}, {"bpf", programs}, {"io_uring", uring}, {"files by their handles", handles}, {"a device", device},
        {"a control group", groups}, {"the kernel's settings", settings}, {"the kernel's settings in /sys", settings_in_sys},
        {"what the host lends", lent},
    };
    files = arguments + 1;
    int at = 1;
    while (at < count && strcmp(arguments[at], "--")) at++;
    for (unsigned i = 0; i < sizeof list / sizeof *list; i++) attempt(list[i].name, list[i].work, 0);
    for (at++; at < count; at++) {
        char *where = strchr(arguments[at], '=');
        *where = 0;
        attempt(arguments[at], 0, where + 1);
    }
    return 0;
}
