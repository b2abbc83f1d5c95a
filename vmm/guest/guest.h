/* The guest's init and control agent: one static binary, PID 1 of every microVM. */
#ifndef TORPOR_GUEST_H
#define TORPOR_GUEST_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* ---- the channel: frames over one virtio-serial port (vmm/guest/README.md) ---- */

#define FRAME_MAGIC 0x52505254u /* "TRPR", little endian */
#define FRAME_MAX_IN 4096u      /* a host frame's payload: small, so that half a one cannot swallow much */
#define FRAME_MAX_OUT 16384u

enum frame_type {
    FRAME_HELLO = 0x01,  /* host: u64 nonce */
    FRAME_WAKE = 0x02,   /* host: struct wake */
    FRAME_CONFIG = 0x03, /* host: a piece of the application's configuration, "key=value\0" entries */
    FRAME_START = 0x04,  /* host: start the application */
    FRAME_IS_HELLO = 0x81, /* u64 nonce, u32 application state, i32 exit code */
    FRAME_WOKEN = 0x82,    /* u64 nonce */
    FRAME_OUTPUT = 0x83,   /* channel 1 standard output, 2 standard error */
    FRAME_EXIT = 0x84,     /* i32 exit code */
};

struct frame {
    uint32_t magic;
    uint8_t type;
    uint8_t reserved;
    uint16_t channel;
    uint32_t length;
} __attribute__((packed));

/* The wall clock stands first: the host writes it last, just before the guest runs. */
struct wake {
    uint64_t wall_ns;
    uint64_t nonce;
    uint32_t reset_tcp;
    uint8_t entropy[64];
} __attribute__((packed));

typedef void frame_handler(uint8_t type, const uint8_t *payload, uint32_t length);

int port_open(void); /* descriptor, or -1 until the port is there */
void port_read(frame_handler *handler);
void port_flush(void);
int port_wants_write(void);
int port_can_take(size_t length);
void port_send(uint8_t type, uint16_t channel, const void *payload, uint32_t length);

/* ---- the application: the image's container ---- */

enum app_state { APP_NONE = 0, APP_RUNNING = 1, APP_EXITED = 2 };

void app_configure(const uint8_t *entries, uint32_t length);
int app_start(void); /* 0, or -1 with a line on standard error */
void app_exited(int status);
extern pid_t app_pid;
extern int app_output, app_errors; /* the ends that we read, or -1 */
extern uint32_t app_state;
extern int32_t app_code;

/* ---- after a restore, and the network ---- */

void wake_up(const struct wake *wake);
void gate_open(void); /* one ruleset: connections from the host reach the application on 127.0.0.1 */
void network_up(void);

void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void must(int result, const char *what); /* powers the machine off when result is negative */
void put(const char *path, const char *text);

#endif
