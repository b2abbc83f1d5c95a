/* The application: the image's ENTRYPOINT and CMD in namespaces of their own, as PID 1 there, with Docker's default
   capabilities unless the image asks for all. */
#define _GNU_SOURCE
#include "app.h"
#include "container.h"
#include "modules.h"
#include "port.h"
#include "start.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEFAULT_CAPABILITIES 0xa80425fbull /* service reference, section 6 */
#define LAST_CAPABILITY 63

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

/* As many as there are: what the kernel cannot take, it refuses itself. The list ends with NULL. */
struct words {
    char **all;
    size_t count;
};

static struct words arguments, environment, volumes;
static char *user = "", *directory = "/";
static int stop_signal = SIGTERM;
int app_is_whole;

pid_t app_pid = -1;
int app_output = -1, app_errors = -1, app_console = -1;
static int console_kept = -1; /* its other end: without one, reading would end whenever nobody has it open */
uint32_t app_state = APP_NONE;
int32_t app_code;

static char *pending; /* an entry whose end comes with the next piece */
static size_t pending_used;

static void add(struct words *words, char *word)
{
    char **all = realloc(words->all, (words->count + 2) * sizeof *all);
    if (!all || !word) { say("out of memory"); return; }
    words->all = all;
    all[words->count++] = word;
    all[words->count] = NULL;
}

static void entry(char *text)
{
    char *value = strchr(text, '=');
    if (!value) return;
    *value++ = 0;
    if (!strcmp(text, "arg")) add(&arguments, strdup(value));
    else if (!strcmp(text, "env")) add(&environment, strdup(value));
    else if (!strcmp(text, "volume")) add(&volumes, strdup(value));
    else if (!strcmp(text, "user")) user = strdup(value);
    else if (!strcmp(text, "dir")) directory = strdup(value);
    else if (!strcmp(text, "stop")) stop_signal = atoi(value);
    else if (!strcmp(text, "capabilities")) app_is_whole = !strcmp(value, "all");
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

static const char *lookup(const char *name)
{
    size_t length = strlen(name);
    for (size_t i = 0; i < environment.count; i++)
        if (!strncmp(environment.all[i], name, length) && environment.all[i][length] == '=') return environment.all[i] + length + 1;
    return NULL;
}

static void set_default(const char *name, const char *value)
{
    char *made = NULL;
    if (!lookup(name) && asprintf(&made, "%s=%s", name, value) > 0) add(&environment, made);
}

static void limit_capabilities(void)
{
    if (app_is_whole) return;
    for (int c = 0; c <= LAST_CAPABILITY; c++)
        if (!(DEFAULT_CAPABILITIES >> c & 1)) prctl(PR_CAPBSET_DROP, c, 0, 0, 0);
}

/* All of /etc/group's: initgroups(3) of musl fails for more than 32. */
static void join_groups(const char *name, gid_t gid)
{
    int count = 0;
    gid_t *groups = NULL;
    getgrouplist(name, gid, groups, &count);
    if (!(groups = malloc((size_t)count * sizeof *groups)) || getgrouplist(name, gid, groups, &count) < 0 || setgroups((size_t)count, groups))
        tell("USER %s: its %d groups cannot be taken: %s", name, count, strerror(errno));
    free(groups);
}

/* USER as Docker reads it: name or number, then optionally a group, by name or number. */
static void become(void)
{
    char *name = strdup(*user ? user : "0"), *group = strchr(name, ':'), *rest;
    if (group) *group++ = 0;
    unsigned long number = strtoul(name, &rest, 10);
    struct passwd *account = *rest ? getpwnam(name) : getpwuid((uid_t)number);
    if (*rest && !account) { tell("USER %s: the image's /etc/passwd has no such user", name); _exit(126); }
    uid_t uid = account ? account->pw_uid : (uid_t)number;
    gid_t gid = account ? account->pw_gid : 0;
    if (group && *group) {
        unsigned long group_number = strtoul(group, &rest, 10);
        struct group *entry_ = *rest ? getgrnam(group) : NULL;
        if (*rest && !entry_) { tell("USER %s: the image's /etc/group has no group %s", user, group); _exit(126); }
        gid = entry_ ? entry_->gr_gid : (gid_t)group_number;
        setgroups(1, &gid);
    } else if (account) join_groups(account->pw_name, gid);
    else setgroups(1, &gid);
    set_default("HOME", account ? account->pw_dir : "/");
    /* A pipe is its maker's: /dev/stdout and /proc/self/fd/1 are opened by name, with USER's rights. */
    (void)!fchown(1, uid, (gid_t)-1); (void)!fchown(2, uid, (gid_t)-1); (void)!chown("/dev/console", uid, (gid_t)-1);
    limit_capabilities();
    must(setgid(gid), "setgid");
    must(setuid(uid), "setuid");
}

/* What an image may count on, and what it may lack. As root, before USER. */
static void make_directories(void)
{
    for (size_t i = 0; i < volumes.count; i++)
        if (make_path(volumes.all[i])) tell("VOLUME %s: %s", volumes.all[i], strerror(errno));
    if (make_path(directory)) { tell("WORKDIR %s: %s", directory, strerror(errno)); _exit(126); }
}

static void send_console(int channel, int master)
{
    union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control;
    struct iovec byte = {"", 1};
    struct msghdr message = {.msg_iov = &byte, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    control.header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(&control.header), &master, sizeof master);
    if (master >= 0) (void)!sendmsg(channel, &message, 0);
}

static void take_console(int channel)
{
    union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control;
    char byte;
    struct iovec room = {&byte, 1};
    struct msghdr message = {.msg_iov = &room, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    if (recvmsg(channel, &message, MSG_CMSG_CLOEXEC) <= 0 || !CMSG_FIRSTHDR(&message)) return;
    memcpy(&app_console, CMSG_DATA(&control.header), sizeof app_console);
    console_kept = ioctl(app_console, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
}

static void run(int output, int errors, int channel)
{
    setsid();
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    dup2(output, 1); dup2(errors, 2);
    send_console(channel, furnish(app_is_whole));
    int nothing = open("/dev/null", O_RDONLY);
    dup2(nothing, 0);
    for (int fd = 3; fd < 64; fd++) close(fd);
    make_directories();
    int is_entered = !chdir(directory); /* with root's rights, as runc does */
    become();
    if (!is_entered && chdir(directory)) { tell("WORKDIR %s: %s", directory, strerror(errno)); _exit(126); }
    set_default("PATH", DEFAULT_PATH);
    setenv("PATH", lookup("PATH"), 1);
    foresee(arguments.all, app_is_whole);
    execvpe(arguments.all[0], arguments.all, environment.all);
    int error = errno;
    explain(arguments.all, environment.all, error);
    _exit(error == ENOENT ? 127 : 126);
}

void app_exec_shell(void)
{
    static char *const bash[] = {"bash", "--norc", "--noprofile", "-i", NULL}, *const sh[] = {"sh", "-i", NULL};
    limit_capabilities();
    clearenv();
    for (size_t i = 0; i < environment.count; i++) putenv(environment.all[i]);
    setenv("PATH", DEFAULT_PATH, 0);
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
    if (!arguments.count) { say("the image has neither ENTRYPOINT nor CMD"); return -1; }
    modules_allow(app_is_whole);
    int output[2], errors[2], channel[2];
    if (pipe2(output, O_CLOEXEC) || pipe2(errors, O_CLOEXEC) || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channel)) return -1;
    app_pid = (pid_t)syscall(SYS_clone, CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | SIGCHLD, 0, 0, 0, 0);
    if (app_pid < 0) { say("clone: %s", strerror(errno)); return -1; }
    if (!app_pid) run(output[1], errors[1], channel[1]);
    close(output[1]);
    close(errors[1]);
    close(channel[1]);
    take_console(channel[0]);
    close(channel[0]);
    app_output = output[0];
    app_errors = errors[0];
    fcntl(app_output, F_SETFL, O_NONBLOCK);
    fcntl(app_errors, F_SETFL, O_NONBLOCK);
    app_state = APP_RUNNING;
    return 0;
}

/* Whether the main thread catches the signal, or blocks it to wait for it (sigwaitinfo(2), signalfd(2)). For a PID 1 that does neither the
   kernel drops it (pid_namespaces(7)): there is nothing to wait for. */
static int is_heeded(int number)
{
    char path[64], line[128];
    unsigned long long mask, heeded = 0;
    snprintf(path, sizeof path, "/proc/%d/status", (int)app_pid);
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "SigBlk: %llx", &mask) == 1 || sscanf(line, "SigCgt: %llx", &mask) == 1) heeded |= mask;
    if (file) fclose(file);
    return number == SIGKILL || (heeded >> (number - 1) & 1);
}

int app_stop(void)
{
    if (app_state != APP_RUNNING) return 0;
    int heeded = is_heeded(stop_signal);
    return !kill(app_pid, stop_signal) && heeded;
}

void app_exited(int status)
{
    /* A shell's way of writing a signal: 128 and its number. */
    app_code = (status & 0x7f) ? 128 + (status & 0x7f) : status >> 8 & 0xff;
    app_state = APP_EXITED;
    port_send(FRAME_EXIT, 0, &app_code, sizeof app_code);
}
