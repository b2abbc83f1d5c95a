/* The connections that a sleep broke. */
#ifndef TORPOR_CONNECTIONS_H
#define TORPOR_CONNECTIONS_H

void connections_prepare(void);
void connections_reset(void); /* those to the outside, also of containers' */

#endif
