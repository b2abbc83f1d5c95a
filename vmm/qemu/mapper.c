/* Maps files over the guest's memory, inside QEMU, before the guest runs: brought in by LD_PRELOAD, told by vmm over a
 * socket. Copying changed pages in costs by what ever changed; mapping them costs by the number of runs, and leaves them
 * file pages until they are written, so that the next suspend stores what changed since.
 *
 * A message is a head (magic, number of ranges) with one descriptor beside it (SCM_RIGHTS), then the ranges; the answer is one
 * errno, 0 for done. vmm/mapping.py is the other end. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAGIC 0x70616d74u
#define RANGES_MAX 65536u

struct head {
    uint32_t magic;
    uint32_t count;
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

static int read_head(struct head *head, int *file)
{
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec io = {head, sizeof *head};
    struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got;
    do got = recvmsg(channel, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL);
    while (got < 0 && errno == EINTR);
    struct cmsghdr *entry = CMSG_FIRSTHDR(&message);
    if (got != sizeof *head || head->magic != MAGIC || head->count > RANGES_MAX) return 0;
    if (!entry || entry->cmsg_type != SCM_RIGHTS || entry->cmsg_len != CMSG_LEN(sizeof(int))) return 0;
    memcpy(file, CMSG_DATA(entry), sizeof *file);
    return 1;
}

static int32_t map(const struct range *ranges, uint32_t count, int file)
{
    for (uint32_t i = 0; i < count; i++) {
        void *want = (void *)(uintptr_t)ranges[i].address;
        int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
        if (mmap(want, ranges[i].length, PROT_READ | PROT_WRITE, flags, file, (off_t)ranges[i].offset) == MAP_FAILED) return errno;
    }
    return 0;
}

static void *serve(void *unused)
{
    (void)unused;
    struct head head;
    int file;
    while (read_head(&head, &file)) {
        struct range *ranges = malloc((size_t)head.count * sizeof *ranges + 1);
        if (!ranges || !read_all(ranges, (size_t)head.count * sizeof *ranges)) {
            close(file);
            free(ranges);
            break;
        }
        int32_t outcome = map(ranges, head.count, file);
        free(ranges);
        close(file);
        if (write(channel, &outcome, sizeof outcome) != sizeof outcome) break;
    }
    close(channel);
    return NULL;
}

__attribute__((constructor)) static void start(void)
{
    const char *number = getenv("TORPOR_MAPPER");
    char program[256] = {0};
    if (!number || readlink("/proc/self/exe", program, sizeof program - 1) < 0 || !strstr(program, "qemu-system")) return;
    channel = atoi(number);
    unsetenv("TORPOR_MAPPER");
    unsetenv("LD_PRELOAD");
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* QEMU's signals are QEMU's threads' */
    pthread_t thread;
    if (pthread_create(&thread, NULL, serve, NULL) == 0) pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
