/* The whole machine, for an application with all capabilities. */
#ifndef TORPOR_WHOLE_H
#define TORPOR_WHOLE_H

void whole_devices(void);
void control_groups(int all_capabilities); /* both in the application's mount namespace */

#endif
