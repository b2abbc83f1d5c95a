/* What every module writes and makes: lines for whoever reads them, files, directories. */
#ifndef TORPOR_UTIL_H
#define TORPOR_UTIL_H

void say(const char *format, ...) __attribute__((format(printf, 1, 2))); /* one line, "init SECONDS: ...", on the console */
void tell(const char *format, ...) __attribute__((format(printf, 1, 2))); /* one line, "torpor: ...", on standard error: the application's log */
void must(int result, const char *what); /* powers the machine off when result is negative */
void put(const char *path, const char *text);
int make_path(const char *path); /* a directory and those above it (0755, root's), through the image's links. 0, or -1 with errno */

#endif
