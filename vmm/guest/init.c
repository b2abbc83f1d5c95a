/* Boot: modules, disk, network; then the loop that serves the channel, the application's output and its end. */
#define _GNU_SOURCE
#include "app.h"
#include "container.h"
#include "gate.h"
#include "listeners.h"
#include "modules.h"
#include "oom.h"
#include "port.h"
#include "shell.h"
#include "util.h"
#include "wake.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void load_modules(const char *list)
{
    FILE *file = fopen(list, "re");
    char name[256];
    while (file && fgets(name, sizeof name, file)) {
        name[strcspn(name, "\n")] = 0;
        int module = open(name, O_RDONLY | O_CLOEXEC);
        if (module < 0) { say("%s: %s", name, strerror(errno)); continue; }
        if (syscall(SYS_finit_module, module, "", 0) < 0 && errno != EEXIST) say("%s: %s", name, strerror(errno));
        close(module);
        unlink(name); /* the initramfs is memory, and memory is in every snapshot */
    }
    if (file) fclose(file);
}

static void make(const char *path, mode_t mode)
{
    if (mkdir(path, mode) == 0) chmod(path, mode);
}

/* What is mounted there must not be led elsewhere. */
static void make_own(const char *path, mode_t mode)
{
    struct stat found;
    if (!lstat(path, &found) && !S_ISDIR(found.st_mode)) unlink(path);
    make(path, mode);
}

/* An image's own link to a directory stays. */
static void make_there(const char *path, mode_t mode)
{
    struct stat found;
    if (stat(path, &found) || !S_ISDIR(found.st_mode)) make_own(path, mode);
}

/* The image's disk becomes the root; nothing of ours is on it. */
static void enter_disk(void)
{
    /* It was a placeholder when the kernel looked for partitions; what was read then went with the last close of the device. */
    must(mount("/dev/vda", "/root", "ext4", MS_NOATIME, "noinit_itable,no_prefetch_block_bitmaps"), "mount /dev/vda");
    make_own("/root/dev", 0755); make_own("/root/proc", 0755); make_own("/root/sys", 0755);
    must(mount("/dev", "/root/dev", NULL, MS_MOVE, NULL), "move /dev");
    must(mount("/proc", "/root/proc", NULL, MS_MOVE, NULL), "move /proc");
    must(mount("/sys", "/root/sys", NULL, MS_MOVE, NULL), "move /sys");
    must(chdir("/root"), "chdir");
    must(mount(".", "/", NULL, MS_MOVE, NULL), "move root");
    must(chroot("."), "chroot");
    must(chdir("/"), "chdir");
    make_there("/tmp", 01777); make_there("/etc", 0755);
    make_there("/run", 0755); make_there("/run/lock", 01777); make_there("/run/user", 0755);
    rmdir("/lost+found"); /* mkfs's */
}

/* What a kernel does by itself every so often, a clone does in its first seconds, and pays for with translating it: statistics folded
   every second, memory looked at for fragments twice a second. */
static void be_quiet(void)
{
    put("/proc/sys/vm/stat_interval", "60");
    put("/proc/sys/vm/compaction_proactiveness", "0");
}

/* A file of ours: what the image has under this name, a link or another name of a file as a rule, is left alone and loses it. */
static void replace(const char *path, const char *text)
{
    unlink(path);
    put(path, text);
}

/* The name is the service's (reference, section 6), the same in every clone. */
static void name_host(void)
{
    (void)!sethostname("localhost", 9);
    replace("/etc/hostname", "localhost\n");
    replace("/etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nff00::0\tip6-mcastprefix\n"
                          "ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n");
    replace("/etc/resolv.conf", "nameserver " HOST_ADDRESS "\n");
    (void)!symlink("/proc/mounts", "/etc/mtab");
}

/* Not before it is needed: a boot is kept, and goes on with another image's disk (vmm/qemu/boot_snapshots.py). */
static void have_disk(void)
{
    static int has_disk;
    if (has_disk) return;
    has_disk = 1;
    enter_disk();
    name_host();
}

static uint16_t two(const uint8_t *bytes) { return (uint16_t)(bytes[0] | bytes[1] << 8); }

static void handle(uint8_t type, uint16_t channel, const uint8_t *payload, uint32_t length)
{
    uint32_t credit;
    switch (type) {
    case FRAME_HELLO: {
        struct hello answer = {0, app_state, app_code, AGENT_PROTOCOL};
        if (length != 8) return;
        memcpy(&answer.nonce, payload, 8);
        port_send(FRAME_IS_HELLO, 0, &answer, sizeof answer);
        return;
    }
    case FRAME_WAKE: {
        struct wake wake;
        if (length != sizeof wake) return;
        memcpy(&wake, payload, sizeof wake);
        if (!wake_up(&wake) && app_state == APP_EXITED) port_send(FRAME_EXIT, 0, &app_code, sizeof app_code); /* the news may be lost, too */
        port_send(FRAME_WOKEN, 0, &wake.nonce, 8);
        return;
    }
    case FRAME_SYNC:
        if (length != 8) return;
        sync();
        port_send(FRAME_WOKEN, 0, payload, 8);
        return;
    case FRAME_STOP: {
        struct { uint64_t nonce; uint32_t is_heeded, nothing; } answer = {0, 0, 0};
        if (length != 8) return;
        memcpy(&answer.nonce, payload, 8);
        answer.is_heeded = (uint32_t)app_stop();
        port_send(FRAME_WOKEN, 0, &answer, sizeof answer);
        return;
    }
    case FRAME_LISTENERS:
        if (length == 8) listeners_send(payload);
        return;
    case FRAME_CONFIG:
        have_disk();
        app_configure(payload, length);
        return;
    case FRAME_START:
        have_disk();
        if (app_state == APP_NONE && app_start() < 0) app_exited(127 << 8);
        return;
    case FRAME_SHELL_OPEN:
        if (length == 4) shell_open(channel, two(payload), two(payload + 2));
        return;
    case FRAME_SHELL_RESIZE:
        if (length == 4) shell_resize(channel, two(payload), two(payload + 2));
        return;
    case FRAME_SHELL_INPUT:
        shell_input(channel, payload, length);
        return;
    case FRAME_SHELL_CREDIT:
        if (length != sizeof credit) return;
        memcpy(&credit, payload, sizeof credit);
        shell_credit(channel, credit);
        return;
    case FRAME_SHELL_CLOSE:
        shell_close(channel);
        return;
    }
}

static void forward(int *from, uint16_t channel)
{
    uint8_t buffer[FRAME_MAX_OUT];
    ssize_t got = read(*from, buffer, sizeof buffer);
    if (got > 0) port_send(FRAME_OUTPUT, channel, buffer, (uint32_t)got);
    else if (got == 0 || (errno != EAGAIN && errno != EINTR)) { close(*from); *from = -1; }
}

static void reap(void)
{
    int status;
    pid_t done;
    while ((done = waitpid(-1, &status, WNOHANG)) > 0) {
        if (done != app_pid) { shell_reaped(done, status); continue; }
        /* What it wrote last comes before the news of its end. */
        for (int i = 0; i < 64 && app_output >= 0; i++) forward(&app_output, 1);
        for (int i = 0; i < 64 && app_errors >= 0; i++) forward(&app_errors, 2);
        if (app_console >= 0) forward(&app_console, 3);
        app_exited(status);
    }
}

static void serve(int signals)
{
    for (;;) {
        struct pollfd fds[7 + SHELLS_MAX] = {
            {signals, POLLIN, 0}, {app_output, POLLIN, 0}, {app_errors, POLLIN, 0}, {app_console, POLLIN, 0},
        };
        port_poll(fds + 4);
        oom_poll(fds + 6);
        shell_poll(fds + 7);
        if (poll(fds, 7 + SHELLS_MAX, -1) < 0) continue;
        oom_ready(fds + 6); /* before the end of the process, if that was the application's */
        if (fds[0].revents) {
            struct signalfd_siginfo info[8];
            (void)!read(signals, info, sizeof info);
            port_signalled();
            reap();
        }
        port_ready(fds + 4, handle);
        if (fds[1].revents) forward(&app_output, 1);
        if (fds[2].revents) forward(&app_errors, 2);
        if (fds[3].revents) forward(&app_console, 3);
        shell_ready(fds + 7);
        port_flush();
    }
}

int main(int argc, char **argv)
{
    if (getpid() != 1) return modules_load(argv);
    make("/proc", 0755); make("/sys", 0755); make("/dev", 0755); make("/root", 0755);
    must(mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=755"), "devtmpfs");
    int console = open("/dev/console", O_RDWR);
    if (console >= 0) { dup2(console, 0); dup2(console, 1); dup2(console, 2); if (console > 2) close(console); }
    if (!strcmp(argv[argc - 1], "probe")) { /* whether guests run here is all that is asked (vmm/probe.py) */
        say("a guest's init runs");
        reboot(RB_POWER_OFF);
    }
    must(mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL), "proc");
    must(mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL), "sysfs");
    load_modules("/modules.list");
    for (int i = 0; i < 1000 && access("/dev/vda", F_OK); i++) usleep(5000);
    must(access("/dev/vda", F_OK), "find /dev/vda");
    be_quiet();
    allow_much();
    modules_prepare();
    network_up();
    gate_open();
    wake_prepare();
    oom_prepare();

    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGIO);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    int signals = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    must(signals, "signalfd");
    while (port_open() < 0) usleep(5000);
    say("ready");
    serve(signals);
}
