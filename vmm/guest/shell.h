/* Shells. */
#ifndef TORPOR_SHELL_H
#define TORPOR_SHELL_H

#include <poll.h>
#include <stdint.h>
#include <sys/types.h>

#define SHELLS_MAX 16

void shell_open(uint16_t id, uint16_t columns, uint16_t rows);
void shell_resize(uint16_t id, uint16_t columns, uint16_t rows);
void shell_credit(uint16_t id, uint32_t bytes);
void shell_input(uint16_t id, const uint8_t *data, uint32_t length);
void shell_close(uint16_t id);
void shell_poll(struct pollfd *fds); /* SHELLS_MAX of them */
void shell_ready(const struct pollfd *fds);
int shell_reaped(pid_t pid, int status); /* whether it was one */

#endif
