/* The application: the image's container. */
#ifndef TORPOR_APP_H
#define TORPOR_APP_H

#include <stdint.h>
#include <sys/types.h>

enum app_state { APP_NONE = 0, APP_RUNNING = 1, APP_EXITED = 2 };

void app_configure(const uint8_t *entries, uint32_t length);
int app_start(void); /* 0, or -1 with a line on standard error */
void app_exited(int status);
int app_stop(void); /* sends it its stop signal: whether it is one that the application heeds */
void app_exec_shell(void); /* inside the container already: environment, directory, rights, exec; returns on failure */
extern pid_t app_pid;
extern int app_output, app_errors, app_console; /* the ends that we read, or -1 */
extern uint32_t app_state;
extern int32_t app_code;
extern int app_is_whole; /* it has all capabilities */

#endif
