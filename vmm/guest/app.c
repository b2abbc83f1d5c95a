/* The application: the image's ENTRYPOINT and CMD in namespaces of their own, as PID 1 there, with Docker's default
   capabilities unless the image asks for all. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define ARGUMENTS_MAX 256
#define ENVIRONMENT_MAX 256
#define DEFAULT_CAPABILITIES 0xa80425fbull /* service reference, section 6 */
#define LAST_CAPABILITY 63

static char *arguments[ARGUMENTS_MAX + 1], *environment[ENVIRONMENT_MAX + 1];
static size_t argument_count, environment_count;
static char *user = "", *directory = "/";
static int all_capabilities;

pid_t app_pid = -1;
int app_output = -1, app_errors = -1;
uint32_t app_state = APP_NONE;
int32_t app_code;

static char *pending; /* an entry whose end comes with the next piece */
static size_t pending_used;

static void entry(char *text)
{
    char *value = strchr(text, '=');
    if (!value) return;
    *value++ = 0;
    if (!strcmp(text, "arg") && argument_count < ARGUMENTS_MAX) arguments[argument_count++] = strdup(value);
    else if (!strcmp(text, "env") && environment_count < ENVIRONMENT_MAX) environment[environment_count++] = strdup(value);
    else if (!strcmp(text, "user")) user = strdup(value);
    else if (!strcmp(text, "dir")) directory = strdup(value);
    else if (!strcmp(text, "capabilities")) all_capabilities = !strcmp(value, "all");
}

void app_configure(const uint8_t *entries, uint32_t length)
{
    pending = realloc(pending, pending_used + length + 1);
    if (!pending) { say("out of memory"); return; }
    memcpy(pending + pending_used, entries, length);
    pending_used += length;
    char *start = pending, *end;
    while ((end = memchr(start, 0, pending_used - (size_t)(start - pending)))) {
        entry(start);
        start = end + 1;
    }
    pending_used -= (size_t)(start - pending);
    memmove(pending, start, pending_used);
}

static void device(const char *path, unsigned major, unsigned minor)
{
    mknod(path, S_IFCHR | 0666, makedev(major, minor));
    chmod(path, 0666);
}

static void own_mounts(void)
{
    mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
    must(mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k"), "/dev");
    device("/dev/null", 1, 3); device("/dev/zero", 1, 5); device("/dev/full", 1, 7);
    device("/dev/random", 1, 8); device("/dev/urandom", 1, 9); device("/dev/tty", 5, 0);
    if (all_capabilities) device("/dev/fuse", 10, 229);
    mkdir("/dev/pts", 0755); mkdir("/dev/shm", 01777); mkdir("/dev/mqueue", 01777);
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,gid=5,mode=620,ptmxmode=666");
    mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=64m");
    (void)!symlink("pts/ptmx", "/dev/ptmx"); (void)!symlink("/proc/self/fd", "/dev/fd");
    (void)!symlink("/proc/self/fd/0", "/dev/stdin"); (void)!symlink("/proc/self/fd/1", "/dev/stdout");
    (void)!symlink("/proc/self/fd/2", "/dev/stderr");
    must(mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL), "/proc");
}

static const char *lookup(const char *name)
{
    size_t length = strlen(name);
    for (char **e = environment; *e; e++)
        if (!strncmp(*e, name, length) && (*e)[length] == '=') return *e + length + 1;
    return NULL;
}

/* USER as Docker reads it: name or number, then optionally a group, by name or number. */
static void become(void)
{
    char name[128];
    snprintf(name, sizeof name, "%s", *user ? user : "0");
    char *group = strchr(name, ':');
    if (group) *group++ = 0;
    char *rest;
    unsigned long number = strtoul(name, &rest, 10);
    struct passwd *account = *rest ? getpwnam(name) : getpwuid((uid_t)number);
    if (*rest && !account) { say("user %s: not in /etc/passwd", name); _exit(126); }
    uid_t uid = account ? account->pw_uid : (uid_t)number;
    gid_t gid = account ? account->pw_gid : 0;
    if (group && *group) {
        unsigned long group_number = strtoul(group, &rest, 10);
        struct group *entry_ = *rest ? getgrnam(group) : NULL;
        if (*rest && !entry_) { say("group %s: not in /etc/group", group); _exit(126); }
        gid = entry_ ? entry_->gr_gid : (gid_t)group_number;
        setgroups(0, NULL);
    } else if (account) initgroups(account->pw_name, gid);
    else setgroups(0, NULL);
    if (!lookup("HOME") && environment_count < ENVIRONMENT_MAX) {
        char *home = NULL;
        if (asprintf(&home, "HOME=%s", account ? account->pw_dir : "/") > 0) environment[environment_count++] = home;
    }
    if (!all_capabilities)
        for (int c = 0; c <= LAST_CAPABILITY; c++)
            if (!(DEFAULT_CAPABILITIES >> c & 1)) prctl(PR_CAPBSET_DROP, c, 0, 0, 0);
    must(setgid(gid), "setgid");
    must(setuid(uid), "setuid");
}

static void run(int output, int errors)
{
    setsid();
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    own_mounts();
    int nothing = open("/dev/null", O_RDONLY);
    dup2(nothing, 0); dup2(output, 1); dup2(errors, 2);
    for (int fd = 3; fd < 64; fd++) close(fd);
    become();
    if (chdir(directory)) { say("WORKDIR %s: %s", directory, strerror(errno)); _exit(126); }
    const char *path = lookup("PATH");
    setenv("PATH", path ? path : "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    execvpe(arguments[0], arguments, environment);
    say("exec %s: %s", arguments[0], strerror(errno));
    _exit(errno == ENOENT ? 127 : 126);
}

void app_exec_shell(void)
{
    static char *const bash[] = {"bash", "--norc", "--noprofile", "-i", NULL}, *const sh[] = {"sh", "-i", NULL};
    if (!all_capabilities)
        for (int c = 0; c <= LAST_CAPABILITY; c++)
            if (!(DEFAULT_CAPABILITIES >> c & 1)) prctl(PR_CAPBSET_DROP, c, 0, 0, 0);
    clearenv();
    for (char **e = environment; *e; e++) putenv(*e);
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 0);
    setenv("HOME", "/root", 0);
    setenv("TERM", "xterm", 1);
    setenv("PS1", "\xce\xbb $ ", 1);
    if (chdir(directory)) (void)!chdir("/");
    execvp("bash", bash);
    execvp("sh", sh);
    say("shell: no bash and no sh: %s", strerror(errno));
}

int app_start(void)
{
    if (!argument_count) { say("the image has neither ENTRYPOINT nor CMD"); return -1; }
    int output[2], errors[2];
    if (pipe2(output, O_CLOEXEC) || pipe2(errors, O_CLOEXEC)) return -1;
    app_pid = (pid_t)syscall(SYS_clone, CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | SIGCHLD, 0, 0, 0, 0);
    if (app_pid < 0) { say("clone: %s", strerror(errno)); return -1; }
    if (!app_pid) run(output[1], errors[1]);
    close(output[1]);
    close(errors[1]);
    app_output = output[0];
    app_errors = errors[0];
    fcntl(app_output, F_SETFL, O_NONBLOCK);
    fcntl(app_errors, F_SETFL, O_NONBLOCK);
    app_state = APP_RUNNING;
    return 0;
}

void app_exited(int status)
{
    /* A shell's way of writing a signal: 128 and its number. */
    app_code = (status & 0x7f) ? 128 + (status & 0x7f) : status >> 8 & 0xff;
    app_state = APP_EXITED;
    port_send(FRAME_EXIT, 0, &app_code, sizeof app_code);
}
