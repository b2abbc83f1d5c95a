/* The channel: frames in, frames out, never blocking and never spinning. */
#define _GNU_SOURCE
#include "port.h"
#include "util.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

#define PORT_NAME "torpor.agent"
#define VSOCK_PORT 1024 /* vmm/driver.py */
#define OUT_SIZE (256u * 1024)

static int port = -1;     /* the channel, or the vsock connection that is it */
static int listener = -1; /* of a vsock */
static int hung_up;
static int heard; /* a frame has come over this connection of a vsock */
static uint8_t in[sizeof(struct frame) + FRAME_MAX_IN];
static size_t in_used;
static uint8_t out[OUT_SIZE];
static size_t out_used;
static uint64_t lost; /* bytes of output that found no room */

/* A virtio-serial port; its device node is numbered by discovery, so it is found by its name. */
static int open_serial(void)
{
    DIR *ports = opendir("/sys/class/virtio-ports");
    struct dirent *entry;
    int found = -1;
    while (ports && found < 0 && (entry = readdir(ports))) {
        char path[300], name[64] = "";
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        FILE *file = fopen(path, "re");
        if (!file) continue;
        if (fgets(name, sizeof name, file) && !strncmp(name, PORT_NAME "\n", sizeof PORT_NAME)) {
            snprintf(path, sizeof path, "/dev/%s", entry->d_name);
            found = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        }
        fclose(file);
    }
    if (ports) closedir(ports);
    if (found >= 0) {
        fcntl(found, F_SETOWN, getpid());
        fcntl(found, F_SETFL, O_NONBLOCK | O_ASYNC);
    }
    return found;
}

/* Where there is none (Firecracker), a vsock: the host connects to us, anew after every restore. */
static int listen_vsock(void)
{
    struct sockaddr_vm any = {.svm_family = AF_VSOCK, .svm_port = VSOCK_PORT, .svm_cid = VMADDR_CID_ANY};
    int made = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (made >= 0 && (bind(made, (void *)&any, sizeof any) || listen(made, 4))) { close(made); made = -1; }
    return made;
}

int port_open(void)
{
    port = open_serial();
    if (port < 0 && !access("/dev/vsock", F_OK)) listener = listen_vsock();
    return port >= 0 || listener >= 0 ? 0 : -1;
}

static void take_connection(void)
{
    int made = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (made < 0) return;
    if (port >= 0) close(port); /* the host that speaks now is the one that counts */
    port = made;
    in_used = 0;
    heard = 0;
}

/* A connection that was made before the guest had handled the reset of its device goes away, with what was written to it. */
static int may_write(void) { return port >= 0 && (listener < 0 || heard); }

/* While no host end of a serial port is connected poll() would answer POLLHUP at once, for ever: then it is left out, and SIGIO,
   which the driver sends when a host connects, is waited for instead. */
void port_poll(struct pollfd *fds)
{
    fds[0] = (struct pollfd){hung_up ? -1 : port, (short)(POLLIN | (out_used && may_write() ? POLLOUT : 0)), 0};
    fds[1] = (struct pollfd){listener, POLLIN, 0};
}

void port_signalled(void) { hung_up = 0; }

static void port_read(frame_handler *handler);

void port_ready(const struct pollfd *fds, frame_handler *handler)
{
    if (fds[0].revents & POLLIN) port_read(handler);
    if (fds[0].revents & (POLLHUP | POLLERR)) {
        if (listener < 0) hung_up = 1;
        else if (port >= 0) { close(port); port = -1; }
    }
    if (fds[1].revents) take_connection();
}

int port_can_take(size_t length) { return out_used + sizeof(struct frame) + length <= OUT_SIZE; }

static void append(uint8_t type, uint16_t channel, const void *payload, uint32_t length)
{
    struct frame frame = {FRAME_MAGIC, type, 0, channel, length};
    memcpy(out + out_used, &frame, sizeof frame);
    memcpy(out + out_used + sizeof frame, payload, length);
    out_used += sizeof frame + length;
}

void port_send(uint8_t type, uint16_t channel, const void *payload, uint32_t length)
{
    char note[80];
    size_t note_length = 0;
    if (lost && type == FRAME_OUTPUT)
        note_length = (size_t)snprintf(note, sizeof note, "\n[torpor: %llu bytes of output lost]\n", (unsigned long long)lost);
    /* Room is kept for the frames that are not output. */
    size_t spare = type == FRAME_OUTPUT ? 4096 : 0;
    if (!port_can_take(length + note_length + sizeof(struct frame) + spare)) {
        if (type == FRAME_OUTPUT) lost += length;
        return;
    }
    if (note_length) { append(FRAME_OUTPUT, 2, note, (uint32_t)note_length); lost = 0; }
    append(type, channel, payload, length);
}

void port_flush(void)
{
    size_t done = 0;
    while (may_write() && done < out_used) {
        ssize_t put = write(port, out + done, out_used - done > 32768 ? 32768 : out_used - done);
        if (put <= 0) break; /* no host, or the ring is full: poll() says when to go on */
        done += (size_t)put;
    }
    if (done) { memmove(out, out + done, out_used - done); out_used -= done; }
}

/* Whatever is not a frame is skipped to the next magic number: a host that died in the middle of one leaves half. */
static size_t take(frame_handler *handler)
{
    size_t at = 0;
    while (in_used - at >= sizeof(struct frame)) {
        struct frame frame;
        memcpy(&frame, in + at, sizeof frame);
        if (frame.magic != FRAME_MAGIC || frame.length > FRAME_MAX_IN) { at++; continue; }
        if (in_used - at < sizeof frame + frame.length) break;
        heard = 1;
        handler(frame.type, frame.channel, in + at + sizeof frame, frame.length);
        at += sizeof frame + frame.length;
    }
    return at;
}

static void port_read(frame_handler *handler)
{
    for (;;) {
        ssize_t got = read(port, in + in_used, sizeof in - in_used);
        if (got == 0 && listener >= 0) { close(port); port = -1; }
        if (got <= 0) return;
        in_used += (size_t)got;
        size_t used = take(handler);
        memmove(in, in + used, in_used - used);
        in_used -= used;
    }
}
