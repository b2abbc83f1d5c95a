/* The application of the lifecycle's benchmark: the least that answers HTTP. GET /dirty?mib=N changes N MiB of its memory once
 * more; anything else is answered "ok". Keep-alive, many connections, one thread. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 256
#define MIB (1u << 20)
static const char answer[] = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok";

static void dirty(const char *request)
{
    static unsigned char *memory;
    static unsigned round;
    const char *number = strstr(request, "mib=");
    size_t size = (number ? strtoul(number + 4, NULL, 10) : 0) * MIB;
    if (!memory) memory = mmap(NULL, 1024ull * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    round++;
    for (size_t at = 0; at < size; at += 64) memory[at] = (unsigned char)(at / 64 * 31 + round);
}

static int serve(int client)
{
    char request[4096];
    ssize_t got = read(client, request, sizeof request - 1);
    if (got <= 0) return 0;
    request[got] = 0;
    if (!strncmp(request, "GET /dirty", 10)) dirty(request);
    return write(client, answer, sizeof answer - 1) == (ssize_t)sizeof answer - 1;
}

int main(void)
{
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(8080)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 256)) return 1;
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
