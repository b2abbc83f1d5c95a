/* Want of memory. */
#ifndef TORPOR_OOM_H
#define TORPOR_OOM_H

#include <poll.h>

void oom_prepare(void);
void oom_poll(struct pollfd *fd);
void oom_ready(const struct pollfd *fd);

#endif
