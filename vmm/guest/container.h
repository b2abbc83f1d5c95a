/* What an application finds around it. */
#ifndef TORPOR_CONTAINER_H
#define TORPOR_CONTAINER_H

void allow_much(void);
int furnish(int all_capabilities);

#endif
