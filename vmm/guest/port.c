/* The channel: frames in, frames out, never blocking and never spinning. */
#define _GNU_SOURCE
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PORT_NAME "torpor.agent"
#define OUT_SIZE (256u * 1024)

static int port = -1;
static uint8_t in[sizeof(struct frame) + FRAME_MAX_IN];
static size_t in_used;
static uint8_t out[OUT_SIZE];
static size_t out_used;
static uint64_t lost; /* bytes of output that found no room */

/* Its device node is numbered by discovery, so it is found by its name. */
int port_open(void)
{
    DIR *ports = opendir("/sys/class/virtio-ports");
    struct dirent *entry;
    while (ports && port < 0 && (entry = readdir(ports))) {
        char path[300], name[64] = "";
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        FILE *file = fopen(path, "re");
        if (!file) continue;
        if (fgets(name, sizeof name, file) && !strncmp(name, PORT_NAME "\n", sizeof PORT_NAME)) {
            snprintf(path, sizeof path, "/dev/%s", entry->d_name);
            port = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        }
        fclose(file);
    }
    if (ports) closedir(ports);
    if (port >= 0) {
        fcntl(port, F_SETOWN, getpid());
        fcntl(port, F_SETFL, O_NONBLOCK | O_ASYNC);
    }
    return port;
}

int port_wants_write(void) { return out_used > 0; }

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
    while (done < out_used) {
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
        handler(frame.type, frame.channel, in + at + sizeof frame, frame.length);
        at += sizeof frame + frame.length;
    }
    return at;
}

void port_read(frame_handler *handler)
{
    for (;;) {
        ssize_t got = read(port, in + in_used, sizeof in - in_used);
        if (got <= 0) return;
        in_used += (size_t)got;
        size_t used = take(handler);
        memmove(in, in + used, in_used - used);
        in_used -= used;
    }
}
