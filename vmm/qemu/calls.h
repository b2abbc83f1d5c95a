#ifndef TORPOR_CALLS_H
#define TORPOR_CALLS_H

/* From here on this process, and all that it starts, makes system calls of the list only. Ends the process where that cannot be had. */
void filter_calls(void);

#endif
