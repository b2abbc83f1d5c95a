/* What every module writes and makes: lines for whoever reads them, files, directories. */
#define _GNU_SOURCE
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

void say(const char *format, ...)
{
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    char line[512];
    int used = snprintf(line, sizeof line, "init %ld.%03ld: ", (long)now.tv_sec, now.tv_nsec / 1000000);
    va_list arguments;
    va_start(arguments, format);
    used += vsnprintf(line + used, sizeof line - (size_t)used - 2, format, arguments);
    va_end(arguments);
    if (used > (int)sizeof line - 2) used = sizeof line - 2;
    line[used++] = '\n';
    (void)!write(2, line, (size_t)used);
}

void tell(const char *format, ...)
{
    char line[1024] = "torpor: ";
    size_t used = strlen(line);
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line + used, sizeof line - used - 1, format, arguments);
    va_end(arguments);
    used = length < 0 || used + (size_t)length > sizeof line - 2 ? sizeof line - 2 : used + (size_t)length;
    line[used++] = '\n';
    (void)!write(2, line, used);
}

void must(int result, const char *what)
{
    if (result >= 0) return;
    say("%s: %s", what, strerror(errno));
    sync();
    reboot(RB_POWER_OFF);
    _exit(1);
}

void put(const char *path, const char *text)
{
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (file < 0) { say("%s: %s", path, strerror(errno)); return; }
    (void)!write(file, text, strlen(text));
    close(file);
}

int make_path(const char *path)
{
    char part[PATH_MAX];
    struct stat found;
    if (strlen(path) >= sizeof part) { errno = ENAMETOOLONG; return -1; }
    strcpy(part, path);
    for (char *end = part;;) {
        end += strspn(end, "/");
        end += strcspn(end, "/");
        char kept = *end;
        *end = 0;
        if (*part && stat(part, &found) && mkdir(part, 0755)) return -1;
        if (!(*end = kept)) break;
    }
    if (stat(path, &found)) return -1;
    if (S_ISDIR(found.st_mode)) return 0;
    errno = ENOTDIR;
    return -1;
}
