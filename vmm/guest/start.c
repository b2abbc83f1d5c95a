/* Why an image does not start: one line more than the kernel's error, for whoever wrote the Dockerfile. */
#define _GNU_SOURCE
#include "start.h"
#include "util.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#define WORD_MAX 131072u /* of one argument or variable, with its end (Linux, MAX_ARG_STRLEN) */
#define WORDS_MAX 2097152u /* of all, with their pointers: a quarter of the stack's limit, which is 8 MiB (execve(2)) */
#define HEAD 4096

static int is_systemd(const char *program)
{
    char real[PATH_MAX];
    const char *name = realpath(program, real) ? strrchr(real, '/') : NULL;
    return name && !strcmp(name, "/systemd");
}

/* ---- programs ---- */

static const char *machine_name(unsigned machine, int is_64_bits)
{
    switch (machine) {
    case EM_X86_64: return is_64_bits ? "x86_64 (linux/amd64)" : "x32";
    case EM_AARCH64: return "aarch64 (linux/arm64)";
    case EM_386: return "i386 (linux/386)";
    case EM_ARM: return "arm (linux/arm)";
    case EM_RISCV: return "riscv64 (linux/riscv64)";
    case EM_PPC64: return "ppc64 (linux/ppc64le)";
    case EM_S390: return "s390x (linux/s390x)";
    }
    return "another processor";
}

#if defined __x86_64__
#define OWN_MACHINE EM_X86_64
#else
#define OWN_MACHINE EM_AARCH64
#endif

/* The program's loader (PT_INTERP) where the image lacks it. */
static int lacks_loader(int file, const Elf64_Ehdr *header, char *loader, size_t size)
{
    for (unsigned i = 0; i < header->e_phnum; i++) {
        Elf64_Phdr part;
        if (pread(file, &part, sizeof part, (off_t)(header->e_phoff + i * sizeof part)) != sizeof part) return 0;
        if (part.p_type != PT_INTERP || part.p_filesz >= size) continue;
        if (pread(file, loader, part.p_filesz, (off_t)part.p_offset) != (ssize_t)part.p_filesz) return 0;
        loader[part.p_filesz] = 0;
        return access(loader, F_OK) != 0;
    }
    return 0;
}

static void explain_elf(const char *path, int file, const uint8_t *head, size_t got)
{
    Elf64_Ehdr header;
    char loader[256];
    if (got < sizeof header) { tell("%s is cut off: an ELF program of %zu bytes", path, got); return; }
    memcpy(&header, head, sizeof header);
    if (header.e_machine != OWN_MACHINE || header.e_ident[EI_CLASS] != ELFCLASS64)
        tell("%s is built for %s, this microVM's processor is %s: build it, or copy it from an image, for the latter", path,
            machine_name(header.e_machine, header.e_ident[EI_CLASS] == ELFCLASS64), machine_name(OWN_MACHINE, 1));
    else if (lacks_loader(file, &header, loader, sizeof loader))
        tell("%s needs the loader %s, which is not in the image: it was built for another C library (glibc, musl): build it on this base, "
             "or statically", path, loader);
}

static void explain_file(const char *path, int error, int depth);

static void explain_script(const char *path, char *line, int depth)
{
    char *end = strchr(line, '\n');
    if (end) *end = 0;
    size_t length = strlen(line);
    if (length && line[length - 1] == '\r') {
        tell("%s has Windows' line ends (CR LF), so that its interpreter's name ends in a CR: save it with LF, or RUN sed -i 's/\\r$//' %s",
            path, path);
        return;
    }
    char *interpreter = line + 2 + strspn(line + 2, " \t");
    interpreter[strcspn(interpreter, " \t")] = 0;
    if (!*interpreter) tell("%s begins with #! and names no interpreter", path);
    else if (access(interpreter, F_OK)) tell("%s is a script for %s, which is not in the image: install it, or name another one", path, interpreter);
    else if (depth) explain_file(interpreter, access(interpreter, X_OK) ? EACCES : ENOEXEC, depth - 1);
}

/* A shell executes by itself what the kernel knows no format of. */
static int by_shell;

static void explain_content(const char *path, int depth)
{
    uint8_t head[HEAD + 1];
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = file < 0 ? -1 : pread(file, head, HEAD, 0);
    if (got < 0) return;
    head[got] = 0;
    if (!got && !by_shell) tell("%s is empty", path);
    else if (got >= 4 && !memcmp(head, ELFMAG, SELFMAG)) explain_elf(path, file, head, (size_t)got);
    else if (head[0] == '#' && head[1] == '!') explain_script(path, (char *)head, depth);
    else if (got >= 5 && !memcmp(head, "\xef\xbb\xbf#!", 5)) tell("%s begins with a byte order mark: save it without one (UTF-8)", path);
    else if (got >= 2 && !memcmp(head, "MZ", 2)) tell("%s is a program for Windows", path);
    else if (got >= 4 && (!memcmp(head, "\xcf\xfa\xed\xfe", 4) || !memcmp(head, "\xca\xfe\xba\xbe", 4))) tell("%s is a program for macOS", path);
    else if (!by_shell) tell("%s is neither a program (ELF) nor a script that begins with #!, as in #!/bin/sh", path);
    close(file);
}

static void explain_file(const char *path, int error, int depth)
{
    struct stat found;
    char target[256];
    ssize_t length = readlink(path, target, sizeof target - 1);
    if (stat(path, &found)) {
        if (length > 0) { target[length] = 0; tell("%s is a link to %s, which is not in the image", path, target); }
        else if (errno == EACCES) tell("a directory on the way to %s may not be entered by this USER (%u)", path, geteuid());
        else if (!strcmp(path, "/bin/sh")) tell("the image has no /bin/sh, which a CMD or ENTRYPOINT in shell form needs: write it as a JSON array, CMD [\"/program\"]");
        else tell("%s is not in the image", path);
        return;
    }
    if (S_ISDIR(found.st_mode)) tell("%s is a directory", path);
    else if (error == EACCES && !(found.st_mode & 0111))
        tell("%s may not be executed by anybody (its mode is %04o): RUN chmod +x %s, or COPY --chmod=755", path, found.st_mode & 07777, path);
    else if (error == EACCES)
        tell("%s may not be executed by this USER (%u; the file is %u:%u's, mode %04o)", path, geteuid(), found.st_uid, found.st_gid, found.st_mode & 07777);
    else explain_content(path, depth);
}

/* The program that a command in shell form begins with, where it is a plain path to a file: the shell's own words for it, "not found" above
   all, say less than is known here. */
static void foresee_command(const char *command)
{
    char path[PATH_MAX];
    struct stat found;
    command += strspn(command, " \t");
    if (!strncmp(command, "exec ", 5)) command += 5 + strspn(command + 5, " \t");
    size_t length = strcspn(command, " \t\n;&|");
    if (length >= sizeof path || strcspn(command, "\"'`$\\*?[]{}()<>=~#") < length) return;
    memcpy(path, command, length);
    path[length] = 0;
    if (!strchr(path, '/') || stat(path, &found)) return;
    by_shell = 1;
    explain_file(path, access(path, X_OK) ? EACCES : ENOEXEC, 1);
}

/* What is sure to fail, and would say so nowhere that anybody looks, or in words that mislead. */
void foresee(char **arguments, int all_capabilities)
{
    if (!all_capabilities && is_systemd(arguments[0]))
        tell("%s is systemd, which mounts file systems and needs all capabilities: create the image with additionalOsCapabilities ALL", arguments[0]);
    if (arguments[1] && arguments[2] && !strcmp(arguments[0], "/bin/sh") && !strcmp(arguments[1], "-c")) foresee_command(arguments[2]);
}

/* ---- arguments and variables ---- */

static void explain_size(char **arguments, char **environment)
{
    size_t all = 0, longest = 0, count = 0;
    char name[64] = "";
    for (int i = 0; i < 2; i++)
        for (char **word = i ? environment : arguments; word && *word; word++, count++) {
            size_t length = strlen(*word) + 1;
            all += length + sizeof *word;
            if (length <= longest) continue;
            longest = length;
            snprintf(name, sizeof name, "%.*s", (int)strcspn(*word, "="), *word);
        }
    if (longest > WORD_MAX) tell("%s has %zu bytes: the kernel takes an argument or variable of %u at most", name, longest - 1, WORD_MAX - 1);
    else tell("the %zu arguments and variables have %zu bytes in all: the kernel takes %u at most", count, all, WORDS_MAX);
}

/* The file that the kernel was asked to execute: along PATH the first of this name, as execvp(3) looks for it. */
static int find(const char *program, char *path, size_t size)
{
    if (strchr(program, '/')) { snprintf(path, size, "%s", program); return 1; }
    const char *list = getenv("PATH");
    while (list) {
        size_t length = strcspn(list, ":");
        snprintf(path, size, "%.*s%s%s", (int)length, list, length ? "/" : "", program);
        if (!access(path, F_OK)) return 1;
        list = list[length] ? list + length + 1 : NULL;
    }
    return 0;
}

void explain(char **arguments, char **environment, int error)
{
    char path[PATH_MAX];
    tell("exec %s: %s", *arguments[0] ? arguments[0] : "\"\"", strerror(error));
    if (error == E2BIG) explain_size(arguments, environment);
    else if (!*arguments[0]) tell("the first word of ENTRYPOINT and CMD is empty");
    else if (find(arguments[0], path, sizeof path)) explain_file(path, error, 1);
    else tell("no directory of PATH has %s (PATH=%s)", arguments[0], getenv("PATH"));
}
