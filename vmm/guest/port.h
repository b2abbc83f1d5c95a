/* The channel: frames over one virtio-serial port, or one vsock connection. */
#ifndef TORPOR_PORT_H
#define TORPOR_PORT_H

#include <poll.h>
#include <stddef.h>
#include <stdint.h>

#define FRAME_MAGIC 0x52505254u /* "TRPR", little endian */
#define FRAME_MAX_IN 4096u      /* a host frame's payload: small, so that half a one cannot swallow much */
#define FRAME_MAX_OUT 16384u

/* What the host may rely on. 1: commit 165a0cb, whose answer to a hello ends before `protocol`. A host speaks all lower ones, since an
 * agent is as old as its image, and leaves alone an image whose number it does not know (gateway/messages.py has the same number).
 * 2: it says its number. 3: a wake with the nonce of the one before is answered, and not carried out again; on a vsock nothing is said
 * before the host has spoken, so that whatever comes shows that the host was heard. */
#define AGENT_PROTOCOL 3

enum frame_type {
    FRAME_HELLO = 0x01,  /* host: u64 nonce */
    FRAME_WAKE = 0x02,   /* host: struct wake */
    FRAME_CONFIG = 0x03, /* host: a piece of the application's configuration, "key=value\0" entries */
    FRAME_START = 0x04,  /* host: start the application */
    FRAME_SHELL_OPEN = 0x05,   /* host: u16 columns, u16 rows; the shell's number is the frame's channel, here and below */
    FRAME_SHELL_INPUT = 0x06,  /* host: what was typed; at most SHELL_WINDOW bytes that were not taken */
    FRAME_SHELL_RESIZE = 0x07, /* host: u16 columns, u16 rows */
    FRAME_SHELL_CREDIT = 0x08, /* host: u32 bytes of output that may be sent */
    FRAME_SHELL_CLOSE = 0x09,  /* host: hang up */
    FRAME_SYNC = 0x0a,         /* host: u64 nonce; answered as a wake is, when all files are on the disk */
    FRAME_STOP = 0x0b,         /* host: u64 nonce; the application is sent its stop signal. Answered u64 nonce, u32 whether it heeds it, u32 0 */
    FRAME_LISTENERS = 0x0c,    /* host: u64 nonce; answered with FRAME_LISTENING */
    FRAME_IS_HELLO = 0x81, /* struct hello */
    FRAME_WOKEN = 0x82,    /* u64 nonce */
    FRAME_OUTPUT = 0x83,   /* channel 1 standard output, 2 standard error, 3 what was written to /dev/console */
    FRAME_EXIT = 0x84,     /* i32 exit code */
    FRAME_SHELL_OUTPUT = 0x85,
    FRAME_SHELL_TAKEN = 0x86, /* u32 bytes of input that the terminal took */
    FRAME_SHELL_EXIT = 0x87,  /* i32 exit code, as a shell writes it */
    FRAME_LISTENING = 0x89,   /* u64 nonce, then of each listening socket: u16 4 or 6, u16 port, 16 bytes of address */
    FRAME_KILLED = 0x88,      /* what the kernel's log says of a process that it killed for want of memory */
};

struct frame {
    uint32_t magic;
    uint8_t type;
    uint8_t reserved;
    uint16_t channel;
    uint32_t length;
} __attribute__((packed));

struct hello {
    uint64_t nonce;
    uint32_t state; /* the application's */
    int32_t code;   /* its exit code */
    uint32_t protocol;
} __attribute__((packed));

typedef void frame_handler(uint8_t type, uint16_t channel, const uint8_t *payload, uint32_t length);

int port_open(void); /* 0, or -1 until there is a port or a vsock */
void port_poll(struct pollfd *fds); /* 2 of them */
void port_ready(const struct pollfd *fds, frame_handler *handler);
void port_signalled(void); /* SIGIO: a host may have connected */
void port_flush(void);
int port_can_take(size_t length);
void port_send(uint8_t type, uint16_t channel, const void *payload, uint32_t length);

#endif
