/* Records what a program does to files below POWER_ROOT, in order, in the file POWER_TRACE: for power.py, which builds from it what a power cut
   at any moment may leave. It is preloaded (ld.so(8), LD_PRELOAD), so that it sees SQLite's calls too.

   A record: one letter, then texts that end with 0 and 64-bit numbers, then data. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int trace = -1;
static const char *root;
static size_t root_length;

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void begin(void)
{
    root = getenv("POWER_ROOT");
    root_length = root ? strlen(root) : 0;
    if (root)
        trace = open(getenv("POWER_TRACE"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static int is_ours(const char *path)
{
    return root && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static void record(char kind, const char *path, const char *other, uint64_t offset, const void *data, uint64_t length)
{
    struct iovec parts[] = {
        {&kind, 1}, {(void *)path, strlen(path) + 1}, {(void *)other, strlen(other) + 1}, {&offset, 8}, {&length, 8}, {(void *)data, data ? length : 0},
    };
    if (writev(trace, parts, 6) < 0)
        abort();
}

static int path_of(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return is_ours(path);
}

static int absolute(int directory, const char *name, char *path)
{
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return is_ours(path);
    }
    char base[PATH_MAX];
    if (directory == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of(directory, base))
        return 0;
    return snprintf(path, PATH_MAX, "%s/%s", base, name) < PATH_MAX && is_ours(path);
}

#define HELD(kind_, result_, expression, condition, ...)       \
    pthread_mutex_lock(&lock);                                 \
    result_ result = expression;                               \
    int kept = errno;                                          \
    if (condition)                                             \
        record(kind_, __VA_ARGS__);                            \
    errno = kept;                                              \
    pthread_mutex_unlock(&lock);                               \
    return result

static void opened(int fd, const char *name, int directory, int flags, int was_there)
{
    char path[PATH_MAX];
    if (fd < 0 || trace < 0 || !absolute(directory, name, path))
        return;
    if ((flags & O_CREAT) && !was_there)
        record('c', path, "", 0, NULL, 0);
    else if (flags & O_TRUNC)
        record('t', path, "", 0, NULL, 0);
}

static int is_there(int directory, const char *name)
{
    struct stat status;
    return !fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW);
}

/* Those of coreutils and tar, whose flags are not known when they are compiled (_FORTIFY_SOURCE), have no mode. */
int __open_2(const char *, int);
int __open64_2(const char *, int);
int __openat_2(int, const char *, int);
int __openat64_2(int, const char *, int);

#define OPENING(name, type, parameters, directory, arguments)             \
    int name parameters                                                  \
    {                                                                    \
        REAL(name);                                                      \
        mode_t mode = 0;                                                 \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        if (flags & (O_CREAT | __O_TMPFILE))                             \
            mode = va_arg(rest, mode_t);                                 \
        va_end(rest);                                                    \
        pthread_mutex_lock(&lock);                                       \
        int was_there = is_there(directory, path);                       \
        int fd = real arguments;                                         \
        int kept = errno;                                                \
        opened(fd, path, directory, flags, was_there);                   \
        errno = kept;                                                    \
        pthread_mutex_unlock(&lock);                                     \
        return fd;                                                       \
    }

OPENING(open, , (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPENING(open64, , (const char *path, int flags, ...), AT_FDCWD, (path, flags, mode))
OPENING(openat, , (int at, const char *path, int flags, ...), at, (at, path, flags, mode))
OPENING(openat64, , (int at, const char *path, int flags, ...), at, (at, path, flags, mode))

#define OPENING_2(name, parameters, directory, arguments)           \
    int name parameters                                            \
    {                                                              \
        REAL(name);                                                \
        pthread_mutex_lock(&lock);                                 \
        int fd = real arguments;                                   \
        int kept = errno;                                          \
        opened(fd, path, directory, flags & ~O_CREAT, 1);          \
        errno = kept;                                              \
        pthread_mutex_unlock(&lock);                               \
        return fd;                                                 \
    }

OPENING_2(__open_2, (const char *path, int flags), AT_FDCWD, (path, flags))
OPENING_2(__open64_2, (const char *path, int flags), AT_FDCWD, (path, flags))
OPENING_2(__openat_2, (int at, const char *path, int flags), at, (at, path, flags))
OPENING_2(__openat64_2, (int at, const char *path, int flags), at, (at, path, flags))

/* What copies inside the kernel is refused: whoever asked reads and writes then. */
#define NO_COPY(name, type, parameters, target, arguments)        \
    type name parameters                                         \
    {                                                            \
        REAL(name);                                              \
        char path[PATH_MAX];                                     \
        if (trace < 0 || !path_of(target, path))                 \
            return real arguments;                               \
        errno = EINVAL;                                          \
        return -1;                                               \
    }
NO_COPY(sendfile, ssize_t, (int out, int in, off_t *at, size_t count), out, (out, in, at, count))
NO_COPY(sendfile64, ssize_t, (int out, int in, off64_t *at, size_t count), out, (out, in, at, count))
NO_COPY(copy_file_range, ssize_t, (int in, off64_t *from, int out, off64_t *to, size_t count, unsigned flags), out, (in, from, out, to, count, flags))

int ioctl(int fd, unsigned long request, ...)
{
    REAL(ioctl);
    char path[PATH_MAX];
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (trace < 0 || request != FICLONE || !path_of(fd, path))
        return real(fd, request, argument);
    errno = EOPNOTSUPP;
    return -1;
}

ssize_t write(int fd, const void *data, size_t length)
{
    REAL(write);
    char path[PATH_MAX];
    if (trace < 0 || !path_of(fd, path))
        return real(fd, data, length);
    off_t at = fcntl(fd, F_GETFL) & O_APPEND ? lseek(fd, 0, SEEK_END) : lseek(fd, 0, SEEK_CUR);
    HELD('w', ssize_t, real(fd, data, length), result > 0, path, "", (uint64_t)at, data, (uint64_t)result);
}

#define PWRITE(name)                                                                                                       \
    ssize_t name(int fd, const void *data, size_t length, off_t at)                                                        \
    {                                                                                                                      \
        REAL(name);                                                                                                        \
        char path[PATH_MAX];                                                                                               \
        if (trace < 0 || !path_of(fd, path))                                                                               \
            return real(fd, data, length, at);                                                                             \
        HELD('w', ssize_t, real(fd, data, length, at), result > 0, path, "", (uint64_t)at, data, (uint64_t)result);        \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define TRUNCATE(name)                                                                          \
    int name(int fd, off_t length)                                                              \
    {                                                                                           \
        REAL(name);                                                                             \
        char path[PATH_MAX];                                                                    \
        if (trace < 0 || !path_of(fd, path))                                                    \
            return real(fd, length);                                                            \
        HELD('t', int, real(fd, length), !result, path, "", (uint64_t)length, NULL, 0);         \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define SYNC(name)                                                                 \
    int name(int fd)                                                               \
    {                                                                              \
        REAL(name);                                                                \
        char path[PATH_MAX];                                                       \
        if (trace < 0 || !path_of(fd, path))                                       \
            return real(fd);                                                       \
        (void)real; /* the disk need not be waited for: that it was asked counts */ \
        HELD('s', int, 0, 1, path, "", 0, NULL, 0);                                \
    }
SYNC(fsync)
SYNC(fdatasync)

int syncfs(int fd)
{
    REAL(syncfs);
    char path[PATH_MAX];
    if (trace < 0 || !path_of(fd, path))
        return real(fd);
    HELD('S', int, 0, 1, path, "", 0, NULL, 0);
}

#define TWO(name, kind, parameters, arguments, from_at, from, to_at, to)                                       \
    int name parameters                                                                                       \
    {                                                                                                         \
        REAL(name);                                                                                           \
        char source[PATH_MAX], target[PATH_MAX];                                                              \
        int ours = trace >= 0 && absolute(from_at, from, source) + absolute(to_at, to, target) == 2;          \
        HELD(kind, int, real arguments, !result && ours, source, target, 0, NULL, 0);                         \
    }
TWO(rename, 'r', (const char *a, const char *b), (a, b), AT_FDCWD, a, AT_FDCWD, b)
TWO(renameat, 'r', (int at, const char *a, int bt, const char *b), (at, a, bt, b), at, a, bt, b)
TWO(link, 'l', (const char *a, const char *b), (a, b), AT_FDCWD, a, AT_FDCWD, b)
TWO(linkat, 'l', (int at, const char *a, int bt, const char *b, int flags), (at, a, bt, b, flags), at, a, bt, b)

int renameat2(int at, const char *a, int bt, const char *b, unsigned flags)
{
    REAL(renameat2);
    char source[PATH_MAX], target[PATH_MAX];
    int ours = trace >= 0 && absolute(at, a, source) + absolute(bt, b, target) == 2;
    HELD(flags & RENAME_EXCHANGE ? 'x' : 'r', int, real(at, a, bt, b, flags), !result && ours, source, target, 0, NULL, 0);
}

#define ONE(name, kind, parameters, arguments, at_, path_)                                      \
    int name parameters                                                                        \
    {                                                                                          \
        REAL(name);                                                                            \
        char path[PATH_MAX];                                                                   \
        int ours = trace >= 0 && absolute(at_, path_, path);                                   \
        HELD(kind, int, real arguments, !result && ours, path, "", 0, NULL, 0);                \
    }
ONE(unlink, 'u', (const char *a), (a), AT_FDCWD, a)
ONE(unlinkat, 'u', (int at, const char *a, int flags), (at, a, flags), at, a)
ONE(rmdir, 'u', (const char *a), (a), AT_FDCWD, a)
ONE(mkdir, 'm', (const char *a, mode_t mode), (a, mode), AT_FDCWD, a)
ONE(mkdirat, 'm', (int at, const char *a, mode_t mode), (at, a, mode), at, a)
