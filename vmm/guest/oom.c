/* The kernel's log is followed for one thing: that it has killed a process for want of memory. The host says so in the microVM's log;
   otherwise nobody would know why an application, or a part of it, is gone. */
#define _GNU_SOURCE
#include "oom.h"
#include "port.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#define RECORD_MAX 8192 /* the longest that the kernel makes; a read with less room fails (kernel: include/linux/printk.h) */
#define SAID_MAX 512

static int messages = -1;

void oom_prepare(void)
{
    messages = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (messages < 0 || lseek(messages, 0, SEEK_END) < 0) say("/dev/kmsg: %s", strerror(errno));
}

void oom_poll(struct pollfd *fd) { *fd = (struct pollfd){messages, POLLIN, 0}; }

/* A record is "priority,number,time,flags;text\n" and then other lines (kernel: Documentation/ABI/testing/dev-kmsg). */
static void look_at(char *record)
{
    char *text = strchr(record, ';');
    if (!text || !strstr(text, "ut of memory: Killed process ")) return;
    size_t length = strcspn(++text, "\n");
    port_send(FRAME_KILLED, 0, text, (uint32_t)(length < SAID_MAX ? length : SAID_MAX));
}

void oom_ready(const struct pollfd *fd)
{
    static char record[RECORD_MAX + 1];
    if (!fd->revents) return;
    for (;;) {
        ssize_t got = read(messages, record, RECORD_MAX);
        if (got < 0 && errno == EPIPE) continue; /* records that were written over since */
        if (got <= 0) return;
        record[got] = 0;
        look_at(record);
    }
}
