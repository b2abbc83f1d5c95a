/* Load for bench-edge that no packaged client makes: handshakes, WebSocket echo, idle connections, an open loop.
   client MODE PORT CONNECTIONS SECONDS RATE HEADFILE — HEADFILE holds the request's head as it is sent.
   Prints one line: done errors seconds p50 p99 (microseconds, of the open loop). TLS always. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum mode { FULL, RESUMED, WEBSOCKET, IDLE, OPEN_LOOP, DIRECT_LOOP };
enum state { CONNECTING, HANDSHAKE, UPGRADE_OUT, UPGRADE_IN, OUT, IN, PARKED, DEAD };
#define MESSAGE (1024 + 8)

struct link {
    int fd;
    SSL *tls;
    enum state state;
    size_t at;
    char in[4096];
    double due;
};

static enum mode mode;
static int port, events, plain;
static size_t head_size;
static char head[16384], message[MESSAGE];
static SSL_CTX *context;
static SSL_SESSION *session;
static long done, errors, ready;
static float *latencies;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int keep_session(SSL *tls, SSL_SESSION *fresh)
{
    (void)tls;
    if (session) SSL_SESSION_free(session);
    session = fresh;
    return 1;
}

static void open_link(struct link *l)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = {htonl(0x7f000001)}};
    int one = 1;
    l->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(l->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (mode == FULL || mode == RESUMED) { /* no TIME_WAIT: ports would run out */
        struct linger reset = {1, 0};
        setsockopt(l->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    }
    connect(l->fd, (void *)&address, sizeof address);
    l->state = CONNECTING;
    l->at = 0;
    struct epoll_event event = {EPOLLIN | EPOLLOUT | EPOLLET, {.ptr = l}};
    epoll_ctl(events, EPOLL_CTL_ADD, l->fd, &event);
}

static void close_link(struct link *l)
{
    if (l->tls) { SSL_set_shutdown(l->tls, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN); SSL_free(l->tls); }
    l->tls = NULL;
    close(l->fd);
    l->state = DEAD;
}

/* 1 done, 0 later, -1 broken */
static int send_all(struct link *l, const char *data, size_t size)
{
    while (l->at < size) {
        ssize_t put = plain ? send(l->fd, data + l->at, size - l->at, MSG_NOSIGNAL) : SSL_write(l->tls, data + l->at, (int)(size - l->at));
        if (put <= 0) {
            if (plain) return errno == EAGAIN ? 0 : -1;
            int why = SSL_get_error(l->tls, (int)put);
            return why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE ? 0 : -1;
        }
        l->at += (size_t)put;
    }
    l->at = 0;
    return 1;
}

static int receive(struct link *l)
{
    if (plain) {
        ssize_t got = recv(l->fd, l->in + l->at, sizeof l->in - 1 - l->at, 0);
        if (got > 0) l->in[l->at + (size_t)got] = 0;
        return got > 0 ? (int)got : got < 0 && errno == EAGAIN ? 0 : -1;
    }
    int got = SSL_read(l->tls, l->in + l->at, (int)(sizeof l->in - 1 - l->at));
    if (got > 0) { l->in[l->at + (size_t)got] = 0; return got; }
    int why = SSL_get_error(l->tls, got);
    return why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE ? 0 : -1;
}

static int step(struct link *l)
{
    int result;
    switch (l->state) {
    case CONNECTING: {
        int error = 0;
        socklen_t size = sizeof error;
        struct sockaddr_in peer;
        getsockopt(l->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) return -1;
        size = sizeof peer;
        if (getpeername(l->fd, (void *)&peer, &size)) return 0;
        if (plain) { ready++; l->state = PARKED; return 1; }
        l->tls = SSL_new(context);
        SSL_set_fd(l->tls, l->fd);
        SSL_set_connect_state(l->tls);
        if (mode == RESUMED && session) SSL_set_session(l->tls, session);
        l->state = HANDSHAKE;
        return 1;
    }
    case HANDSHAKE:
        result = SSL_do_handshake(l->tls);
        if (result != 1) {
            int why = SSL_get_error(l->tls, result);
            return why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE ? 0 : -1;
        }
        if (mode != IDLE) ready++; /* an idle connection is ready when it has had an answer */
        l->state = mode == WEBSOCKET ? UPGRADE_OUT : mode == OPEN_LOOP ? PARKED : OUT;
        return 1;
    case UPGRADE_OUT:
        if ((result = send_all(l, head, head_size)) == 1) l->state = UPGRADE_IN;
        return result;
    case UPGRADE_IN:
        if ((result = receive(l)) <= 0) return result;
        l->at += (size_t)result;
        if (!strstr(l->in, "\r\n\r\n")) return 1;
        if (!strstr(l->in, " 101 ")) return -1;
        l->at = 0;
        l->state = OUT;
        return 1;
    case OUT:
        result = mode == WEBSOCKET ? send_all(l, message, sizeof message) : send_all(l, head, head_size);
        if (result == 1) l->state = IN;
        return result;
    case IN: {
        if (mode == WEBSOCKET) {
            size_t before = l->at;
            l->at = 0;
            result = receive(l);
            l->at = before;
            if (result <= 0) return result;
            l->at += (size_t)result;
            if (l->at >= sizeof message) { done++; l->at = 0; l->state = OUT; }
            return 1;
        }
        if ((result = receive(l)) <= 0) return result;
        l->at += (size_t)result;
        if (!strstr(l->in, "hello\n")) return 1;
        if (strncmp(l->in, "HTTP/1.1 200", 12)) return -1;
        l->at = 0;
        if (mode == OPEN_LOOP || mode == DIRECT_LOOP) latencies[done] = (float)((now() - l->due) * 1e6);
        else if (mode == IDLE) ready++;
        done++;
        if (mode == FULL || mode == RESUMED) { close_link(l); open_link(l); return 0; }
        l->state = PARKED;
        return 1;
    }
    case PARKED: {
        char nothing[64];
        result = plain ? (int)recv(l->fd, nothing, sizeof nothing, 0) : SSL_read(l->tls, nothing, sizeof nothing);
        if (plain) return result < 0 && errno == EAGAIN ? 0 : -1;
        int why = SSL_get_error(l->tls, result);
        return result <= 0 && (why == SSL_ERROR_WANT_READ) ? 0 : -1;
    }
    case DEAD:
        return 0;
    }
    return -1;
}

static void run(struct link *l)
{
    int result;
    while ((result = step(l)) > 0 && l->state != DEAD) { }
    if (result < 0) { errors++; close_link(l); if (mode == FULL || mode == RESUMED) open_link(l); }
}

static int by_size(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

int main(int count, char **words)
{
    static const char *names[] = {"full", "resumed", "websocket", "idle", "open", "direct"};
    if (count != 7) return 2;
    for (int i = 0; i < 6; i++) if (!strcmp(words[1], names[i])) mode = (enum mode)i;
    plain = mode == DIRECT_LOOP;
    port = atoi(words[2]);
    int links = atoi(words[3]);
    double seconds = atof(words[4]), rate = atof(words[5]);
    FILE *file = fopen(words[6], "r");
    head_size = file ? fread(head, 1, sizeof head, file) : 0;
    if (!head_size) return 2;
    memset(message, 'x', sizeof message);
    memcpy(message, "\x82\xfe\x04\x00\0\0\0\0", 8); /* a masked binary frame of 1 KiB, masked with nothing */
    context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
    if (mode == RESUMED) {
        SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
        SSL_CTX_sess_set_new_cb(context, keep_session);
    } else SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    events = epoll_create1(0);
    struct link *all = calloc((size_t)links, sizeof *all);
    latencies = malloc(sizeof(float) * ((size_t)(rate * seconds) + 100000));
    int opened = links < 64 ? links : 64, parked = 0;
    for (int i = 0; i < opened; i++) open_link(&all[i]);
    double begin = now(), next = 0, end = begin + seconds;
    struct epoll_event got[256];
    while (now() < end) {
        int many = epoll_wait(events, got, 256, mode == OPEN_LOOP || mode == DIRECT_LOOP ? 0 : 50);
        for (int i = 0; i < many; i++) run(got[i].data.ptr);
        while (opened < links && ready + errors + 64 > opened) open_link(&all[opened++]);
        if (mode == IDLE && !parked && ready + errors >= links) {
            parked = 1;
            printf("ready %ld %ld\n", ready, errors);
            fflush(stdout);
        }
        if ((mode == OPEN_LOOP || mode == DIRECT_LOOP) && ready >= links) {
            double at = now();
            if (!next) { next = at; begin = at; end = at + seconds; }
            while (next <= at) {
                struct link *free_one = NULL;
                for (int i = 0; i < links && !free_one; i++) if (all[i].state == PARKED) free_one = &all[i];
                if (!free_one) break; /* late: its latency counts from when it was due */
                free_one->due = next;
                next += 1 / rate;
                free_one->state = OUT;
                run(free_one);
            }
        }
    }
    double took = now() - begin, p50 = 0, p99 = 0;
    if (mode == OPEN_LOOP || mode == DIRECT_LOOP) {
        qsort(latencies, (size_t)done, sizeof *latencies, by_size);
        if (done) { p50 = latencies[done / 2]; p99 = latencies[done * 99 / 100]; }
    }
    printf("%ld %ld %.3f %.1f %.1f\n", done, errors, took, p50, p99);
    return 0;
}
