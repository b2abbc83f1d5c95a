/* The application of tests/vm/test_guest_memory.py: it holds memory, and says whether it is as it was left.
 *
 * GET /hold/KIND/PERCENT  a child takes PERCENT % of the guest's memory: "held MIB", or "killed SIGNAL" when it did not live to say so
 * GET /check              whether all of it is as it was written: "whole"
 * GET /free               the child ends, and what it held with it
 * GET /available          what a process could still take, MiB
 *
 * KIND: process (private memory), tmpfs (an anonymous file in memory), file (a file on the disk, of which an eighth is written and all is
 * read, and so in the page cache), self (private memory of the application itself, not of a child's). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096u
#define FILE_NAME "/var/tmp/held"

static pid_t holder;
static int asks, answers; /* the pipes to the child and back */

static long meminfo(const char *name)
{
    char line[128];
    long kib = 0;
    FILE *file = fopen("/proc/meminfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, name, strlen(name))) kib = atol(line + strlen(name) + 1);
    if (file) fclose(file);
    return kib;
}

/* A page that no other page of the guest is like. */
static uint64_t stamp(uint64_t page) { return page * 0x9e3779b97f4a7c15u + 1; }

static uint64_t chunk[256][PAGE / 8];

static void write_file(int file, uint64_t pages)
{
    for (uint64_t at = 0; at < pages; at += 256) {
        uint64_t count = pages - at < 256 ? pages - at : 256;
        for (uint64_t i = 0; i < count; i++) chunk[i][0] = stamp(at + i);
        if (write(file, chunk, count * PAGE) != (ssize_t)(count * PAGE)) { perror("write"); _exit(1); }
    }
}

static const char *check(const volatile uint64_t *memory, uint64_t pages, uint64_t written)
{
    for (uint64_t page = 0; page < pages; page++)
        if (memory[page * (PAGE / 8)] != (page < written ? stamp(page) : 0) || memory[page * (PAGE / 8) + 1]) return "changed";
    return "whole";
}

static volatile uint64_t *take(uint64_t pages)
{
    volatile uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (uint64_t page = 0; memory != MAP_FAILED && page < pages; page++) memory[page * (PAGE / 8)] = stamp(page);
    return memory;
}

static void hold(const char *kind, uint64_t pages, int from, int to)
{
    volatile uint64_t *memory;
    uint64_t written = pages;
    if (!strcmp(kind, "process")) memory = take(pages);
    else {
        int is_file = !strcmp(kind, "file");
        int file = is_file ? open(FILE_NAME, O_RDWR | O_CREAT | O_TRUNC, 0600) : memfd_create("held", 0);
        if (is_file) written = pages / 8;
        write_file(file, written);
        if (ftruncate(file, (off_t)(pages * PAGE))) { perror("ftruncate"); _exit(1); }
        for (uint64_t at = 0; is_file && at < pages; at += 256) (void)!pread(file, chunk, sizeof chunk, (off_t)(at * PAGE));
        memory = mmap(NULL, pages * PAGE, PROT_READ, MAP_SHARED, file, 0);
    }
    if (memory == MAP_FAILED) { perror("mmap"); _exit(1); }
    for (char byte = 0; ; ) {
        const char *answer = byte ? check(memory, pages, written) : "held";
        (void)!write(to, answer, strlen(answer));
        if (read(from, &byte, 1) != 1) _exit(0);
        byte = 1;
    }
}

static void let_go(void)
{
    if (!holder) return;
    kill(holder, SIGKILL);
    waitpid(holder, NULL, 0);
    close(asks);
    close(answers);
    unlink(FILE_NAME);
    holder = 0;
}

/* What the child says, or what became of it. */
static void hear(char *text, size_t size)
{
    int status;
    ssize_t got = holder ? read(answers, text, size - 1) : -1;
    if (got > 0) { text[got] = 0; return; }
    snprintf(text, size, "nobody");
    if (holder && waitpid(holder, &status, 0) == holder) {
        snprintf(text, size, WIFSIGNALED(status) ? "killed %d" : "ended %d", WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
        close(asks);
        close(answers);
        unlink(FILE_NAME);
        holder = 0;
    }
}

static void answer(const char *path, char *text, size_t size)
{
    char kind[16];
    unsigned percent;
    if (sscanf(path, "/hold/%15[a-z]/%u", kind, &percent) == 2) {
        uint64_t pages = (uint64_t)meminfo("MemTotal:") * percent / 100 / 4;
        int down[2], up[2];
        let_go();
        if (!strcmp(kind, "self")) take(pages);
        if (pipe2(down, O_CLOEXEC) || pipe2(up, O_CLOEXEC)) return;
        holder = fork();
        if (!holder) {
            close(down[1]);
            close(up[0]);
            hold(kind, pages, down[0], up[1]);
        }
        close(down[0]);
        close(up[1]);
        asks = down[1];
        answers = up[0];
        hear(text, size);
        size_t used = strlen(text);
        snprintf(text + used, size - used, " %llu", (unsigned long long)pages * 4 / 1024);
    } else if (!strcmp(path, "/check")) {
        if (holder) (void)!write(asks, "c", 1);
        hear(text, size);
    } else if (!strcmp(path, "/free")) {
        let_go();
        snprintf(text, size, "freed");
    } else snprintf(text, size, "%ld of %ld MiB", meminfo("MemAvailable:") / 1024, meminfo("MemTotal:") / 1024);
}

int main(void)
{
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(8080)};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    signal(SIGPIPE, SIG_IGN);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&any, sizeof any) || listen(listener, 16)) { perror("listen"); return 1; }
    for (;;) {
        char head[8192], path[256] = "/", text[128] = "", reply[512];
        int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        size_t used = 0;
        ssize_t got = 0;
        while (used < sizeof head - 1 && (got = read(client, head + used, sizeof head - 1 - used)) > 0) {
            head[used += (size_t)got] = 0;
            if (strstr(head, "\r\n\r\n")) break;
        }
        if (got > 0 && sscanf(head, "%*s %255s", path) == 1) {
            answer(path, text, sizeof text);
            int length = snprintf(reply, sizeof reply, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n%s", strlen(text), text);
            (void)!write(client, reply, (size_t)length);
        }
        close(client);
    }
}
