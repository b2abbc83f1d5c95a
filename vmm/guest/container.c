/* What the application finds around it, as Docker gives it: limits, directories, devices, and what is masked or read-only of /proc and /sys
   (OCI runtime-spec, config-linux.md: default devices, maskedPaths, readonlyPaths). */
#define _GNU_SOURCE
#include "container.h"
#include "util.h"
#include "whole.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <termios.h>
#include <unistd.h>

/* ---- limits ---- */

/* Those of a host that runs Docker: systemd's, and what distributions set for programs that are usual in containers. A microVM's kernel is
   its own, so that what an application may not set itself (/proc/sys is read-only for it) is set high. */
void allow_much(void)
{
    static const struct { int what; struct rlimit limit; } limits[] = {
        {RLIMIT_NOFILE, {1024, 524288}}, /* soft: the service's; hard: systemd's */
        {RLIMIT_MEMLOCK, {8 << 20, RLIM_INFINITY}},
        {RLIMIT_NPROC, {RLIM_INFINITY, RLIM_INFINITY}},
    };
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (setrlimit(limits[i].what, &limits[i].limit)) say("limit %d: %s", limits[i].what, strerror(errno));
    put("/proc/sys/fs/file-max", "9223372036854775807");
    put("/proc/sys/fs/inotify/max_user_instances", "1024");
    put("/proc/sys/fs/inotify/max_user_watches", "524288");
    put("/proc/sys/kernel/pid_max", "4194304");
    put("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    put("/proc/sys/vm/max_map_count", "1048576");
}

/* ---- mounts ---- */

static void device(const char *path, unsigned major, unsigned minor)
{
    mknod(path, S_IFCHR | 0666, makedev(major, minor));
    chmod(path, 0666);
}

static void mask(const char *path)
{
    struct stat found;
    if (stat(path, &found)) return;
    int result = S_ISDIR(found.st_mode)
        ? mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=0,nr_inodes=1")
        : mount("/dev/null", path, NULL, MS_BIND, NULL);
    if (result) say("mask %s: %s", path, strerror(errno));
}

static void make_read_only(const char *path)
{
    const unsigned long flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC;
    if (access(path, F_OK) || !mount(NULL, path, NULL, flags, NULL)) return; /* a mount of its own already */
    if (mount(path, path, NULL, MS_BIND | MS_REC, NULL) || mount(NULL, path, NULL, flags, NULL)) say("%s: %s", path, strerror(errno));
}

static void confine(void)
{
    static const char *const masked[] = {
        "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi",
        "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
    };
    static const char *const read_only[] = {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger", "/sys"};
    for (size_t i = 0; i < sizeof masked / sizeof *masked; i++) mask(masked[i]);
    for (size_t i = 0; i < sizeof read_only / sizeof *read_only; i++) make_read_only(read_only[i]);
}

/* A terminal on /dev/console, as `docker run -t` has it: what systemd and others write there comes into the log. The end that we read,
   or -1. */
static int make_console(void)
{
    char name[32];
    struct termios settings;
    int number, zero = 0, master = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (master < 0 || ioctl(master, TIOCSPTLCK, &zero) || ioctl(master, TIOCGPTN, &number)) return master;
    snprintf(name, sizeof name, "/dev/pts/%d", number);
    put("/dev/console", "");
    if (mount(name, "/dev/console", NULL, MS_BIND, NULL)) say("/dev/console: %s", strerror(errno));
    if (!tcgetattr(master, &settings)) {
        settings.c_oflag &= ~(tcflag_t)OPOST; /* lines of a log end without a carriage return */
        tcsetattr(master, TCSANOW, &settings);
    }
    return master;
}

/* In the application's mount namespace. The console's end that is to be read, or -1. */
int furnish(int all_capabilities)
{
    mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
    umount2("/proc", MNT_DETACH); /* init's, of all processes */
    must(mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL), "/proc");
    if (all_capabilities) whole_devices();
    else {
        umount2("/dev", MNT_DETACH);
        must(mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k"), "/dev");
    }
    device("/dev/null", 1, 3); device("/dev/zero", 1, 5); device("/dev/full", 1, 7);
    device("/dev/random", 1, 8); device("/dev/urandom", 1, 9); device("/dev/tty", 5, 0);
    mkdir("/dev/pts", 0755); mkdir("/dev/shm", 01777); mkdir("/dev/mqueue", 01777);
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,gid=5,mode=620,ptmxmode=666");
    mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777,size=64m");
    mount("mqueue", "/dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    (void)!symlink("pts/ptmx", "/dev/ptmx"); (void)!symlink("/proc/self/fd", "/dev/fd");
    (void)!symlink("/proc/self/fd/0", "/dev/stdin"); (void)!symlink("/proc/self/fd/1", "/dev/stdout");
    (void)!symlink("/proc/self/fd/2", "/dev/stderr"); (void)!symlink("/proc/kcore", "/dev/core");
    int console = make_console();
    if (!all_capabilities) confine();
    control_groups(all_capabilities);
    return console;
}
