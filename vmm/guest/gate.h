/* The network, and the way from the host to the application. */
#ifndef TORPOR_GATE_H
#define TORPOR_GATE_H

#define HOST_ADDRESS "169.254.77.1" /* the host's side of the link: the way out, and the resolver */
#define GUEST_ADDRESS "169.254.77.2"

void gate_open(void); /* one ruleset: connections from the host reach the application on 127.0.0.1 */
void network_up(void);

#endif
