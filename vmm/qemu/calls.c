/* The filter of system calls below a hypervisor (vmm/calls.py has the lists, and makes calls.inc of them), set before its first line: what
 * follows inherits it, and nothing takes it back. A process that cannot be filtered does not go on. */
#define _GNU_SOURCE
#include "calls.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "calls.inc"

#define COUNT(list) (sizeof(list) / sizeof *(list))
#define X32 0x40000000u /* the other way to call an x86-64 kernel */
#define NAMESPACES                                                                                                                        \
    (CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)
#define LOAD(field) (struct sock_filter) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define IF(kind, value, yes, no) (struct sock_filter) BPF_JUMP(BPF_JMP | kind | BPF_K, value, yes, no)
#define RETURN(what) (struct sock_filter) BPF_STMT(BPF_RET | BPF_K, what)
#define AWAY (SECCOMP_RET_ERRNO | ENOSYS)

static void die(const char *why)
{
    static const char head[] = "the hypervisor's system calls cannot be filtered: ";
    if (write(2, head, sizeof head - 1) < 0 || write(2, why, strlen(why)) < 0 || write(2, "\n", 1) < 0) _exit(1);
    _exit(1);
}

void filter_calls(void)
{
    static struct sock_filter code[2 * (COUNT(allowed) + COUNT(answered)) + 32];
    unsigned short at = 0;

    code[at++] = LOAD(arch);
    code[at++] = IF(BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0);
    code[at++] = RETURN(SECCOMP_RET_KILL_PROCESS);
    code[at++] = LOAD(nr);
    for (size_t i = 0; i < COUNT(allowed); i++) { /* the kernel looks at each once, and remembers it (Linux 5.11) */
        code[at++] = IF(BPF_JEQ, allowed[i], 0, 1);
        code[at++] = RETURN(SECCOMP_RET_ALLOW);
    }
    for (size_t i = 0; i < COUNT(answered); i++) {
        code[at++] = IF(BPF_JEQ, answered[i], 0, 1);
        code[at++] = RETURN(AWAY);
    }
    code[at++] = IF(BPF_JGE, X32, 2, 0);
    code[at++] = IF(BPF_JGT, KNOWN, 0, 1);
    code[at++] = RETURN(AWAY);
    code[at++] = IF(BPF_JEQ, SYS_clone, 1, 0); /* threads, and nothing that has a process or a namespace of its own */
    code[at++] = RETURN(SECCOMP_RET_KILL_PROCESS);
    code[at++] = LOAD(args[0]); /* the lower half, where its flags are */
    code[at++] = IF(BPF_JSET, NAMESPACES, 2, 0);
    code[at++] = IF(BPF_JSET, CLONE_THREAD, 0, 1);
    code[at++] = RETURN(SECCOMP_RET_ALLOW);
    code[at++] = RETURN(SECCOMP_RET_KILL_PROCESS);

    struct sock_fprog program = {.len = at, .filter = code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) die(strerror(errno));
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) < 0) die(strerror(errno));
}
