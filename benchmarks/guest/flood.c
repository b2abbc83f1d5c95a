/* The attacker's application of bench-security. GET /flood?what=W&seconds=N&address=A begins one flood, which ends by itself after N
 * seconds; GET /count answers how much was done so far (processes, pages, MiB, packets, lines, questions, connections, turns). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST 64
#define PROCESSES 500
#define CONNECTIONS 64
#define MIB (1u << 20)
#define STORM (192u * MIB)
#define FILE_MIB 512

static struct { _Atomic unsigned long done; _Atomic int alive; double end; } *shared;
static struct sockaddr_in target;

static double now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

static int over(void) { return now() > shared->end; }

/* Each process makes another while there is room, and ends when there is none: PROCESSES of them come and go. */
static void forks(void)
{
    while (!over()) {
        if (atomic_fetch_add(&shared->alive, 1) >= PROCESSES) {
            atomic_fetch_sub(&shared->alive, 2); /* that one and this one */
            return;
        }
        pid_t child = fork();
        if (child > 0) shared->done++;
        if (child < 0) atomic_fetch_sub(&shared->alive, 1);
    }
}

static void memory(void)
{
    unsigned char *at = mmap(NULL, STORM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (unsigned char round = 1; at != MAP_FAILED && !over(); round++)
        for (size_t page = 0; page < STORM && (page % MIB || !over()); page += 4096, shared->done++) at[page] = round;
}

static void disk(void)
{
    static unsigned char block[MIB];
    int file = open("/fill", O_RDWR | O_CREAT | O_TRUNC, 0600);
    unlink("/fill"); /* it goes with this process */
    for (unsigned long number = 0; file >= 0 && !over(); number++) {
        memset(block, (int)(number % 255 + 1), sizeof block);
        if (pwrite(file, block, sizeof block, (off_t)(number % FILE_MIB) * MIB) != sizeof block) return;
        if (number % 8 == 7) fdatasync(file);
        shared->done++;
    }
}

static void lines(void)
{
    char line[101];
    memset(line, 'x', sizeof line);
    line[100] = '\n';
    while (!over()) shared->done += write(STDOUT_FILENO, line, sizeof line) == (ssize_t)sizeof line;
}

static void packets(int is_question)
{
    int one = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    char payload[64] = {0};
    size_t size = sizeof payload;
    target.sin_port = htons(is_question ? 53 : 9);
    for (unsigned long number = 0; !over(); number++) {
        if (is_question) { /* a name that nobody asked for before, of type A (RFC 1035, 4.1) */
            memcpy(payload, "\0\7\1\0\0\1\0\0\0\0\0\0\x0a", 13);
            snprintf(payload + 13, 11, "%010lu", number);
            memcpy(payload + 23, "\7example\3com\0\0\1\0\1", 17);
            size = 40;
        }
        shared->done += sendto(one, payload, size, 0, (struct sockaddr *)&target, sizeof target) > 0;
    }
}

static void connections(void)
{
    int open[CONNECTIONS] = {0};
    target.sin_port = htons(7777);
    for (unsigned long number = 0; !over(); number++) {
        int *one = &open[number % CONNECTIONS];
        if (*one) close(*one);
        *one = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        connect(*one, (struct sockaddr *)&target, sizeof target);
        shared->done++;
    }
}

static void flood(const char *request)
{
    const char *what = strstr(request, "what="), *seconds = strstr(request, "seconds="), *address = strstr(request, "address=");
    char text[16] = "";
    if (!what || !seconds || !address) return;
    shared->end = now() + atof(seconds + 8);
    shared->alive = 1;
    sscanf(address + 8, "%15[0-9.]", text);
    target = (struct sockaddr_in){.sin_family = AF_INET};
    inet_pton(AF_INET, text, &target.sin_addr);
    if (fork()) return;
    for (int one = 3; one < MOST + 8; one++) close(one); /* the clients' connections end with the server's own */
    what += 5;
    if (!strncmp(what, "forks", 5)) forks();
    else if (!strncmp(what, "memory", 6)) memory();
    else if (!strncmp(what, "disk", 4)) disk();
    else if (!strncmp(what, "lines", 5)) lines();
    else if (!strncmp(what, "packets", 7)) packets(0);
    else if (!strncmp(what, "names", 5)) packets(1);
    else if (!strncmp(what, "connections", 11)) connections();
    else while (!over()) shared->done++;
    _exit(0);
}

static int serve(int client)
{
    char request[4096], body[32] = "ok", answer[256];
    ssize_t got = read(client, request, sizeof request - 1);
    if (got <= 0) return 0;
    request[got] = 0;
    if (!strncmp(request, "GET /flood", 10)) flood(request);
    if (!strncmp(request, "GET /count", 10)) snprintf(body, sizeof body, "%lu", shared->done);
    int size = snprintf(answer, sizeof answer, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %zu\r\n\r\n%s", strlen(body), body);
    return write(client, answer, size) == size;
}

int main(void)
{
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(8080)};
    signal(SIGCHLD, SIG_IGN); /* the kernel takes away who has ended */
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (shared == MAP_FAILED || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 256)) return 1;
    struct pollfd open[MOST] = {{.fd = listener, .events = POLLIN}};
    nfds_t count = 1;
    for (;;) {
        poll(open, count, -1);
        for (nfds_t i = count; i-- > 1;) {
            if (!open[i].revents || serve(open[i].fd)) continue;
            close(open[i].fd);
            open[i] = open[--count];
        }
        if (open[0].revents && count < MOST) open[count++] = (struct pollfd){.fd = accept(listener, NULL, NULL), .events = POLLIN};
    }
}
