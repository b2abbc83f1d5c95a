/* Shells: a root shell in the application's container on a PTY of that container, one for each that the host opens.
   Both directions go by credit, so that a slow reader on either side stops its own shell and nothing else. */
#define _GNU_SOURCE
#include "shell.h"
#include "app.h"
#include "port.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define KEPT 65536u /* input that the terminal has not taken; the host never sends more than it was told */

struct shell {
    uint16_t id; /* 0: free */
    pid_t pid;
    int master;
    uint32_t credit; /* bytes that we may still send */
    uint8_t *in;
    size_t in_used;
};

static struct shell shells[SHELLS_MAX];

static struct shell *find(uint16_t id)
{
    for (int i = 0; i < SHELLS_MAX; i++) if (shells[i].id == id) return &shells[i];
    return NULL;
}

static void enter(const char *kind)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/ns/%s", (int)app_pid, kind);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || setns(file, 0) < 0) { say("shell: %s: %s", path, strerror(errno)); _exit(126); }
    close(file);
}

static void start(int terminal)
{
    static const char *const namespaces[] = {"ipc", "uts", "pid", "mnt"};
    for (int i = 0; i < 4; i++) enter(namespaces[i]);
    pid_t inside = fork(); /* a PID namespace is entered by children */
    if (inside) {
        int status = 126 << 8;
        close(terminal);
        if (inside > 0) waitpid(inside, &status, 0);
        _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    }
    setsid();
    ioctl(terminal, TIOCSCTTY, 0);
    dup2(terminal, 0); dup2(terminal, 1); dup2(terminal, 2);
    for (int fd = 3; fd < 64; fd++) close(fd);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    app_exec_shell();
    _exit(127);
}

static void release(struct shell *shell)
{
    close(shell->master);
    free(shell->in);
    memset(shell, 0, sizeof *shell);
}

void shell_open(uint16_t id, uint16_t columns, uint16_t rows)
{
    struct shell *shell = find(0);
    char path[64];
    int32_t failed = 126;
    snprintf(path, sizeof path, "/proc/%d/root/dev/pts/ptmx", (int)app_pid);
    if (!id || find(id) || !shell || app_state != APP_RUNNING) { port_send(FRAME_SHELL_EXIT, id, &failed, sizeof failed); return; }
    int master = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC), zero = 0;
    int terminal = master < 0 || ioctl(master, TIOCSPTLCK, &zero) ? -1 : ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (terminal < 0) {
        say("shell: %s: %s", path, strerror(errno));
        if (master >= 0) close(master);
        port_send(FRAME_SHELL_EXIT, id, &failed, sizeof failed);
        return;
    }
    *shell = (struct shell){.id = id, .master = master, .in = malloc(KEPT)};
    shell_resize(id, columns, rows);
    shell->pid = shell->in ? fork() : -1;
    if (!shell->pid) start(terminal);
    close(terminal);
    if (shell->pid < 0) { /* a pid of -1 would be everybody's to kill(2) */
        say("shell: %s", strerror(errno));
        release(shell);
        port_send(FRAME_SHELL_EXIT, id, &failed, sizeof failed);
    }
}

void shell_resize(uint16_t id, uint16_t columns, uint16_t rows)
{
    struct shell *shell = find(id);
    struct winsize size = {.ws_col = columns, .ws_row = rows};
    if (id && shell) ioctl(shell->master, TIOCSWINSZ, &size);
}

void shell_credit(uint16_t id, uint32_t bytes)
{
    struct shell *shell = find(id);
    if (id && shell && bytes < 1u << 24) shell->credit += bytes;
}

static void drain(struct shell *shell)
{
    ssize_t put = shell->in_used ? write(shell->master, shell->in, shell->in_used) : 0;
    if (put <= 0) return;
    uint32_t taken = (uint32_t)put;
    shell->in_used -= (size_t)put;
    memmove(shell->in, shell->in + put, shell->in_used);
    port_send(FRAME_SHELL_TAKEN, shell->id, &taken, sizeof taken);
}

void shell_input(uint16_t id, const uint8_t *data, uint32_t length)
{
    struct shell *shell = find(id);
    if (!id || !shell || shell->in_used + length > KEPT) return;
    memcpy(shell->in + shell->in_used, data, length);
    shell->in_used += length;
    drain(shell);
}

/* The host hung up: the terminal goes, and the kernel tells its processes. */
void shell_close(uint16_t id)
{
    struct shell *shell = find(id);
    if (!id || !shell) return;
    pid_t pid = shell->pid;
    close(shell->master);
    shell->master = -1;
    kill(pid, SIGKILL); /* it only waits; what runs inside has had its SIGHUP */
}

void shell_poll(struct pollfd *fds)
{
    for (int i = 0; i < SHELLS_MAX; i++) {
        struct shell *shell = &shells[i];
        fds[i] = (struct pollfd){-1, 0, 0};
        if (!shell->id || shell->master < 0) continue;
        fds[i].events = (short)((shell->credit && port_can_take(FRAME_MAX_OUT + 4096) ? POLLIN : 0) | (shell->in_used ? POLLOUT : 0));
        if (fds[i].events) fds[i].fd = shell->master;
    }
}

static void forward(struct shell *shell)
{
    uint8_t buffer[FRAME_MAX_OUT];
    size_t most = shell->credit < sizeof buffer ? shell->credit : sizeof buffer;
    ssize_t got = most && port_can_take(most + 4096) ? read(shell->master, buffer, most) : -1;
    if (got <= 0) return;
    shell->credit -= (uint32_t)got;
    port_send(FRAME_SHELL_OUTPUT, shell->id, buffer, (uint32_t)got);
}

void shell_ready(const struct pollfd *fds)
{
    for (int i = 0; i < SHELLS_MAX; i++) {
        if (fds[i].fd < 0) continue;
        if (fds[i].revents & POLLOUT) drain(&shells[i]);
        if (fds[i].revents & (POLLIN | POLLHUP)) forward(&shells[i]);
    }
}

int shell_reaped(pid_t pid, int status)
{
    for (int i = 0; i < SHELLS_MAX; i++) {
        struct shell *shell = &shells[i];
        if (!shell->id || shell->pid != pid) continue;
        int32_t code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        /* What it wrote last comes before the news of its end. */
        if (shell->master >= 0) for (int n = 0; n < 16; n++) forward(shell);
        port_send(FRAME_SHELL_EXIT, shell->id, &code, sizeof code);
        release(shell);
        return 1;
    }
    return 0;
}
