/* The table's server: POST /run executes the body with /bin/sh and answers with what it printed and its exit code (X-Exit-Code);
 * GET /cat?PATH answers with a file, GET /env with the environment. One process for each connection; needs no libc in the image. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;
static char request[1 << 16], answer[1 << 20];

static void respond(int client, int status, int code, const char *body, size_t length)
{
    char head[200];
    int n = snprintf(head, sizeof head, "HTTP/1.1 %d X\r\nContent-Length: %zu\r\nX-Exit-Code: %d\r\nConnection: close\r\n\r\n", status, length, code);
    if (write(client, head, n) < 0 || write(client, body, length) < 0)
        exit(1);
}

static size_t collect(int fd)
{
    size_t length = 0;
    for (ssize_t n; length < sizeof answer && (n = read(fd, answer + length, sizeof answer - length)) > 0;)
        length += n;
    return length;
}

static void execute(int client, const char *command)
{
    int out[2], status;
    if (pipe(out))
        exit(1);
    pid_t child = fork();
    if (!child) {
        signal(SIGCHLD, SIG_DFL);
        dup2(out[1], 1), dup2(out[1], 2);
        close(out[0]), close(out[1]), close(client);
        execl("/bin/sh", "sh", "-c", command, (char *)0);
        dprintf(2, "/bin/sh: %s\n", strerror(errno));
        _exit(127);
    }
    close(out[1]);
    size_t length = collect(out[0]);
    waitpid(child, &status, 0);
    respond(client, 200, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), answer, length);
}

static void serve(int client)
{
    size_t length = 0, wanted = 0;
    char *body = 0;
    while (!body || length < wanted) {
        ssize_t n = read(client, request + length, sizeof request - 1 - length);
        if (n <= 0)
            exit(0);
        length += n, request[length] = 0;
        if (!body && (body = strstr(request, "\r\n\r\n"))) {
            body += 4;
            for (char *line = request; line < body; line = strchr(line, '\n') + 1)
                if (!strncasecmp(line, "content-length:", 15))
                    wanted = atol(line + 15);
            wanted += body - request;
        }
    }
    if (!strncmp(request, "POST /run ", 10)) {
        execute(client, body);
    } else if (!strncmp(request, "GET /env ", 9)) {
        size_t at = 0;
        for (char **one = environ; *one && at < sizeof answer; one++)
            at += snprintf(answer + at, sizeof answer - at, "%s\n", *one);
        respond(client, 200, 0, answer, at);
    } else if (!strncmp(request, "GET /cat?", 9)) {
        *strchr(request + 9, ' ') = 0;
        int fd = open(request + 9, O_RDONLY);
        if (fd < 0)
            respond(client, 404, errno, strerror(errno), strlen(strerror(errno)));
        else
            respond(client, 200, 0, answer, collect(fd));
    } else {
        respond(client, 200, 0, "hello\n", 6);
    }
    exit(0);
}

/* server [PORT [ADDRESS]]: of IPv4, all of its addresses by default, or of IPv6. */
int main(int argc, char **argv)
{
    int one = 1, port = argc > 1 ? atoi(argv[1]) : 8080, family = argc > 2 && strchr(argv[2], ':') ? AF_INET6 : AF_INET;
    int listener = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct sockaddr_in6 at6 = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    if (argc > 2)
        inet_pton(family, argv[2], family == AF_INET6 ? (void *)&at6.sin6_addr : (void *)&at.sin_addr);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, family == AF_INET6 ? (void *)&at6 : (void *)&at, family == AF_INET6 ? sizeof at6 : sizeof at) || listen(listener, 64)) {
        perror("server");
        return 1;
    }
    signal(SIGCHLD, SIG_IGN);
    for (int client; (client = accept4(listener, 0, 0, SOCK_CLOEXEC)) >= 0 || errno == EINTR;) {
        if (client < 0)
            continue;
        if (!fork()) {
            signal(SIGCHLD, SIG_DFL);
            serve(client);
        }
        close(client);
    }
    return 1;
}
