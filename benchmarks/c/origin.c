/* The application behind all proxies of bench-edge: HTTP/1.1, one thread, as little work as possible, so that what is
   measured is the proxy. GET / says hello, GET /bytes/N sends N bytes, PUT is read and answered, an upgrade echoes bytes. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK (256 * 1024)
enum state { AT_HEAD, IN_BODY, SENDING, ECHO };

struct peer {
    int fd;
    enum state state;
    char in[16384];
    size_t used;
    long long left; /* of a body, either way */
    char *pending;  /* echoed bytes that did not fit */
    size_t pending_size;
};

static char fill[CHUNK];
static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
static const char hello[] = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\n\r\nhello\n";
static const char upgraded[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                               "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

static int put(struct peer *p, const char *data, size_t size)
{
    while (size) {
        ssize_t sent = send(p->fd, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) { usleep(50); continue; } /* small answers only */
        if (sent < 0) return -1;
        data += sent;
        size -= (size_t)sent;
    }
    return 0;
}

static int pump(struct peer *p)
{
    while (p->left > 0) {
        size_t step = p->left < CHUNK ? (size_t)p->left : CHUNK;
        ssize_t sent = send(p->fd, fill, step, MSG_NOSIGNAL);
        if (sent < 0) return errno == EAGAIN ? 0 : -1;
        p->left -= sent;
    }
    p->state = AT_HEAD;
    return 0;
}

static int request(struct peer *p, char *head)
{
    char *length = strcasestr(head, "\ncontent-length:");
    if (strcasestr(head, "\nupgrade:")) { p->state = ECHO; return put(p, upgraded, sizeof upgraded - 1); }
    if (!strncmp(head, "GET /bytes/", 11)) {
        char text[128];
        p->left = atoll(head + 11);
        int size = snprintf(text, sizeof text, "HTTP/1.1 200 OK\r\nContent-Length: %lld\r\n\r\n", p->left);
        p->state = SENDING;
        return put(p, text, (size_t)size) < 0 ? -1 : pump(p);
    }
    p->left = length ? atoll(length + 16) : 0;
    if (p->left) { /* curl waits a second for a server that does not answer what it expects (RFC 9110, 10.1.1) */
        p->state = IN_BODY;
        return strcasestr(head, "\nexpect: 100-continue") ? put(p, go_on, sizeof go_on - 1) : 0;
    }
    return put(p, hello, sizeof hello - 1);
}

static int readable(struct peer *p)
{
    for (;;) {
        if (p->state == SENDING) return 0;
        if (p->state == IN_BODY || p->state == ECHO) {
            static char body[CHUNK];
            ssize_t got = recv(p->fd, body, p->state == IN_BODY && p->left < CHUNK ? (size_t)p->left : CHUNK, 0);
            if (got <= 0) return got < 0 && errno == EAGAIN ? 0 : -1;
            if (p->state == ECHO) { if (put(p, body, (size_t)got) < 0) return -1; continue; }
            p->left -= got;
            if (!p->left) { p->state = AT_HEAD; if (put(p, hello, sizeof hello - 1) < 0) return -1; }
            continue;
        }
        ssize_t got = recv(p->fd, p->in + p->used, sizeof p->in - 1 - p->used, 0);
        if (got <= 0) return got < 0 && errno == EAGAIN ? 0 : -1;
        p->used += (size_t)got;
        p->in[p->used] = 0;
        char *end;
        while (p->state == AT_HEAD && (end = strstr(p->in, "\r\n\r\n"))) {
            *end = 0;
            size_t used = (size_t)(end - p->in) + 4;
            if (request(p, p->in) < 0) return -1;
            memmove(p->in, p->in + used, p->used - used + 1);
            p->used -= used;
        }
        if (p->used && p->state == IN_BODY) { p->left -= (long long)p->used; p->used = 0; }
        if (p->used && p->state == ECHO) { if (put(p, p->in, p->used) < 0) return -1; p->used = 0; }
        if (p->state == IN_BODY && p->left <= 0) { p->state = AT_HEAD; if (put(p, hello, sizeof hello - 1) < 0) return -1; }
    }
}

int main(int count, char **words)
{
    if (count < 2 || count > 3) return 2; /* PORT [ADDRESS] */
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1, events = epoll_create1(0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(words[1])), .sin_addr = {inet_addr(count > 2 ? words[2] : "127.0.0.1")}};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 8192)) { perror("origin"); return 1; }
    struct epoll_event event = {EPOLLIN, {.ptr = NULL}}, ready[256];
    epoll_ctl(events, EPOLL_CTL_ADD, listener, &event);
    memset(fill, 'x', sizeof fill);
    for (;;) {
        int many = epoll_wait(events, ready, 256, -1);
        for (int i = 0; i < many; i++) {
            struct peer *p = ready[i].data.ptr;
            if (!p) {
                int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                if (fd < 0) continue;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                p = calloc(1, sizeof *p);
                p->fd = fd;
                struct epoll_event mine = {EPOLLIN | EPOLLOUT | EPOLLET, {.ptr = p}};
                epoll_ctl(events, EPOLL_CTL_ADD, fd, &mine);
                continue;
            }
            int bad = 0;
            if (p->state == SENDING && (ready[i].events & EPOLLOUT)) bad = pump(p);
            if (!bad) bad = readable(p);
            if (bad) { close(p->fd); free(p); }
        }
    }
}
