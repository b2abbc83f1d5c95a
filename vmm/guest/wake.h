/* After a restore: the clock, the random numbers, the connections. */
#ifndef TORPOR_WAKE_H
#define TORPOR_WAKE_H

#include <stdint.h>

/* The wall clock stands first: the host writes it last, just before the guest runs. */
struct wake {
    uint64_t wall_ns;
    uint64_t nonce;
    uint32_t reset_tcp;
    uint8_t entropy[64];
} __attribute__((packed));

void wake_prepare(void);
int wake_up(const struct wake *wake); /* 0: it was carried out before */

#endif
