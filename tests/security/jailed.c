/* A stand-in for Firecracker: gives up what that does, but what it is told to keep, says so, and waits. */
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(int count, char **words) {
    int is_filtered = count < 2 || strcmp(words[1], "calls") != 0;
    struct sock_filter all = {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW};
    struct sock_fprog program = {1, &all};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return 1;
    if (is_filtered && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) return 1;
    if (write(1, "waits\n", 6) != 6) return 1;
    for (;;) pause();
}
