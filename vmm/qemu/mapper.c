/* Gives a QEMU that waits what a session has, before the guest runs: brought in by LD_PRELOAD, told by vmm over a socket. Before all else it
 * has the process's system calls filtered (calls.c).
 *
 * MAP lays a file over parts of the guest's memory. Copying changed pages in costs by what ever changed; mapping them costs by
 * the number of runs, and leaves them file pages until they are written, so that the next suspend stores what changed since.
 * For /dev/zero it lays memory of this process's own there, as it is where the image's file has a hole.
 *
 * PUT puts one open file in the place of another, wherever this process has that one open: the session's disk and tap for those
 * that stood in for them. QEMU has looked at neither: disks are inactive until the incoming state is loaded, when it reads them
 * anew, as in any migration, and sets the tap up for its features. Told by QMP, which QEMU reads byte by byte, the same took 7 ms.
 *
 * A message is a head (magic, what to do, number of ranges) with descriptors beside it (SCM_RIGHTS: the file, and for PUT the
 * one that it replaces), then the ranges; the answer is one errno, 0 for done. vmm/mapping.py is the other end. */
#define _GNU_SOURCE
#include "calls.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC 0x70616d74u
#define RANGES_MAX 65536u
#define DESCRIPTORS_MAX 256

enum { MAP = 1, PUT = 2 };

struct head {
    uint32_t magic;
    uint32_t what;
    uint32_t count; /* of ranges */
};

struct range {
    uint64_t address; /* in this process */
    uint64_t length;
    uint64_t offset; /* in the file */
};

static int channel;

static int read_all(void *to, size_t length)
{
    char *at = to;
    while (length) {
        ssize_t got = read(channel, at, length);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return 0;
        at += got;
        length -= (size_t)got;
    }
    return 1;
}

/* `files`: the file, and for PUT the one that it replaces. */
static int read_head(struct head *head, int files[2])
{
    char control[CMSG_SPACE(2 * sizeof(int))] = {0};
    struct iovec io = {head, sizeof *head};
    struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got;
    do got = recvmsg(channel, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL);
    while (got < 0 && errno == EINTR);
    struct cmsghdr *entry = CMSG_FIRSTHDR(&message);
    if (got != sizeof *head || head->magic != MAGIC || head->count > RANGES_MAX) return 0;
    size_t length = (head->what == PUT ? 2 : 1) * sizeof(int);
    if (!entry || entry->cmsg_type != SCM_RIGHTS || entry->cmsg_len != CMSG_LEN(length)) return 0;
    memcpy(files, CMSG_DATA(entry), length);
    return 1;
}

static int32_t map(const struct range *ranges, uint32_t count, int file)
{
    struct stat of;
    if (fstat(file, &of) < 0) return errno;
    int is_zero = S_ISCHR(of.st_mode);
    int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE | (is_zero ? MAP_ANONYMOUS : 0);
    for (uint32_t i = 0; i < count; i++) {
        void *want = (void *)(uintptr_t)ranges[i].address;
        if (mmap(want, ranges[i].length, PROT_READ | PROT_WRITE, flags, is_zero ? -1 : file, (off_t)ranges[i].offset) == MAP_FAILED)
            return errno;
        if (is_zero) madvise(want, ranges[i].length, MADV_NOHUGEPAGE); /* one byte written would be 512 pages of the next diff */
    }
    return 0;
}

static int32_t put(int file, int replaced)
{
    struct stat wanted, seen;
    int32_t outcome = EBADF; /* nobody has it open */
    if (fstat(replaced, &wanted) < 0) return errno;
    for (int at = 0; at < DESCRIPTORS_MAX; at++) {
        if (at == file || at == replaced || fstat(at, &seen) < 0) continue;
        if (seen.st_dev != wanted.st_dev || seen.st_ino != wanted.st_ino) continue;
        if (dup3(file, at, fcntl(at, F_GETFD) & FD_CLOEXEC ? O_CLOEXEC : 0) < 0) return errno;
        outcome = 0;
    }
    return outcome;
}

static void *serve(void *unused)
{
    (void)unused;
    struct head head;
    int files[2] = {-1, -1};
    while (read_head(&head, files)) {
        struct range *ranges = malloc((size_t)head.count * sizeof *ranges + 1);
        int is_whole = ranges && read_all(ranges, (size_t)head.count * sizeof *ranges);
        int32_t outcome = EINVAL;
        if (is_whole && head.what == MAP) outcome = map(ranges, head.count, files[0]);
        if (is_whole && head.what == PUT) outcome = put(files[0], files[1]);
        free(ranges);
        for (int i = 0; i < 2; i++) {
            if (files[i] >= 0) close(files[i]);
            files[i] = -1;
        }
        if (!is_whole || write(channel, &outcome, sizeof outcome) != sizeof outcome) break;
    }
    close(channel);
    return NULL;
}

__attribute__((constructor)) static void start(void)
{
    const char *number = getenv("TORPOR_MAPPER"), *unfiltered = getenv("TORPOR_UNFILTERED");
    char program[256] = {0};
    if (readlink("/proc/self/exe", program, sizeof program - 1) < 0 || !strstr(program, "qemu-system")) return;
    if (!unfiltered) filter_calls();
    channel = number ? atoi(number) : -1;
    unsetenv("TORPOR_MAPPER");
    unsetenv("TORPOR_UNFILTERED");
    unsetenv("LD_PRELOAD");
    if (channel < 0) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* QEMU's signals are QEMU's threads' */
    pthread_t thread;
    if (pthread_create(&thread, NULL, serve, NULL) == 0) pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
