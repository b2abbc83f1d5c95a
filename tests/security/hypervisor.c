/* A hypervisor that a guest has taken over: it is called as one, in its jail, and tries what it is told. Prints what came of it. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define NONE 0xdead /* no call, descriptor, or address of anything */

/* Each with arguments that the kernel refuses when it comes to look at them: a call that comes so far has passed the wall. */
static const struct {
    const char *name;
    long number;
    long arguments[6];
} calls[] = {
    {"acct", SYS_acct, {1}},
    {"add_key", SYS_add_key, {0, 0, 0, 0, 0}},
    {"bpf", SYS_bpf, {NONE, 0, 0}},
    {"chroot", SYS_chroot, {1}},
    {"clone new user", SYS_clone, {CLONE_NEWUSER | CLONE_THREAD, 0, 0, 0, 0}},
    {"clone process", SYS_clone, {CLONE_SIGHAND, 0, 0, 0, 0}},
    {"clone3", SYS_clone3, {0, 1}},
    {"delete_module", SYS_delete_module, {1, 0}},
    {"execve", SYS_execve, {1, 0, 0}},
    {"execveat", SYS_execveat, {-1, 1, 0, 0, NONE}},
    {"finit_module", SYS_finit_module, {-1, 0, NONE}},
    {"fsopen", SYS_fsopen, {1, NONE}},
    {"init_module", SYS_init_module, {1, 0, 1}},
    {"io_uring_setup", SYS_io_uring_setup, {0, 0}},
    {"ioperm", SYS_ioperm, {-1, -1, 1}},
    {"iopl", SYS_iopl, {7}},
    {"kcmp", SYS_kcmp, {-1, -1, NONE, 0, 0}},
    {"kexec_load", SYS_kexec_load, {0, NONE, 0, NONE}},
    {"keyctl", SYS_keyctl, {NONE, 0, 0, 0, 0}},
    {"memfd_secret", SYS_memfd_secret, {NONE}},
    {"mknod", SYS_mknod, {1, 0, 0}},
    {"modify_ldt", SYS_modify_ldt, {NONE, 0, 0}},
    {"mount", SYS_mount, {1, 1, 1, 0, 0}},
    {"move_mount", SYS_move_mount, {-1, 1, -1, 1, NONE}},
    {"mq_open", SYS_mq_open, {1, 0, 0, 0}},
    {"msgget", SYS_msgget, {NONE, 0}},
    {"name_to_handle_at", SYS_name_to_handle_at, {-1, 1, 0, 0, NONE}},
    {"open_by_handle_at", SYS_open_by_handle_at, {-1, 0, 0}},
    {"open_tree", SYS_open_tree, {-1, 1, NONE}},
    {"perf_event_open", SYS_perf_event_open, {0, 0, 0, 0, NONE}},
    {"personality", SYS_personality, {0xffffffff}},
    {"pidfd_getfd", SYS_pidfd_getfd, {-1, 0, 0}},
    {"pidfd_open", SYS_pidfd_open, {-1, 0}},
    {"pivot_root", SYS_pivot_root, {1, 1}},
    {"process_vm_readv", SYS_process_vm_readv, {-1, 0, 0, 0, 0, NONE}},
    {"process_vm_writev", SYS_process_vm_writev, {-1, 0, 0, 0, 0, NONE}},
    {"ptrace", SYS_ptrace, {NONE, -1, 0, 0}},
    {"quotactl", SYS_quotactl, {NONE, 0, 0, 0}},
    {"reboot", SYS_reboot, {0, 0, 0, 0}},
    {"request_key", SYS_request_key, {0, 0, 0, 0}},
    {"sethostname", SYS_sethostname, {1, NONE}},
    {"setns", SYS_setns, {-1, 0}},
    {"settimeofday", SYS_settimeofday, {1, 1}},
    {"setuid", SYS_setuid, {0}},
    {"shmget", SYS_shmget, {NONE, 0, 0}},
    {"socket alg", SYS_socket, {38, 5, 0}},
    {"socket internet", SYS_socket, {2, 1, 0}},
    {"socket netlink", SYS_socket, {16, 3, 0}},
    {"socket packet", SYS_socket, {17, 3, 0}},
    {"socket unix", SYS_socket, {1, 1, 0}},
    {"socket vsock", SYS_socket, {40, 1, 0}},
    {"swapon", SYS_swapon, {1, 0}},
    {"syslog", SYS_syslog, {NONE, 0, 0}},
    {"umount2", SYS_umount2, {1, NONE}},
    {"unshare", SYS_unshare, {NONE}},
    {"userfaultfd", SYS_userfaultfd, {NONE}},
    {"x32", 0x40000000 | SYS_getpid, {0}},
    /* What it is to be able to do, as a control of the others. */
    {"getpid", SYS_getpid, {0}},
    {"later call", 4000, {0}},
};

static int said(long result)
{
    if (result >= 0) puts("done");
    else printf("errno %d\n", errno);
    fflush(stdout);
    return 0;
}

static int abstract(const char *name)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    strncpy(to.sun_path + 1, name, sizeof to.sun_path - 2);
    int one = socket(AF_UNIX, SOCK_STREAM, 0);
    return one < 0 ? one : connect(one, (struct sockaddr *)&to, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name)));
}

static int listed(const char *directory, int numbers)
{
    DIR *all = opendir(directory);
    int found = 0;
    if (!all) return -1;
    for (struct dirent *one; (one = readdir(all));) found += numbers ? one->d_name[0] > '0' && one->d_name[0] <= '9' : one->d_name[0] != '.';
    closedir(all);
    return found;
}

int main(int count, char **words)
{
    const char *what = count > 1 ? words[1] : "", *with = count > 2 ? words[2] : "";
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (strcmp(calls[i].name, what) == 0) {
            const long *with_these = calls[i].arguments;
            errno = 0;
            return said(syscall(calls[i].number, with_these[0], with_these[1], with_these[2], with_these[3], with_these[4], with_these[5]));
        }
    if (strcmp(what, "names") == 0) {
        for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) puts(calls[i].name);
        return 0;
    }
    if (strcmp(what, "32 bits") == 0) {
        long result;
        __asm__ volatile("int $0x80" : "=a"(result) : "a"(20) : "memory"); /* getpid, as an i386 has it */
        return said(result < 0 ? (errno = (int)-result, -1) : result);
    }
    if (strcmp(what, "read") == 0) return said(open(with, O_RDONLY | O_CLOEXEC));
    if (strcmp(what, "write") == 0) return said(open(with, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    if (strcmp(what, "signal") == 0) return said(kill(atoi(with), 0));
    if (strcmp(what, "abstract") == 0) return said(abstract(with));
    if (strcmp(what, "processes") == 0) return printf("%d\n", listed("/proc", 1)) < 0;
    if (strcmp(what, "interfaces") == 0) return printf("%d\n", listed("/sys/class/net", 0)) < 0;
    if (strcmp(what, "descriptors") == 0) return printf("%d\n", listed("/proc/self/fd", 0) - 1) < 0;
    return 2;
}
