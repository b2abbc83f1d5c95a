/* Kernel modules. */
#ifndef TORPOR_MODULES_H
#define TORPOR_MODULES_H

void modules_prepare(void);
void modules_allow(int all_capabilities);
int modules_load(char **arguments); /* what the kernel runs when it asks for one: the exit code */

#endif
