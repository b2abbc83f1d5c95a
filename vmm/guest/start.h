/* Why an image does not start, in words for who wrote it. */
#ifndef TORPOR_START_H
#define TORPOR_START_H

void foresee(char **arguments, int all_capabilities);
void explain(char **arguments, char **environment, int error); /* execve(2)'s error */

#endif
