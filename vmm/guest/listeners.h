/* What listens. */
#ifndef TORPOR_LISTENERS_H
#define TORPOR_LISTENERS_H

#include <stdint.h>

void listeners_send(const uint8_t *nonce);

#endif
