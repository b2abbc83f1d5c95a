/* An application whose whole state is a count: in its memory, and as lines of a file on its disk. Each request adds one to both, and is
 * answered with both, so that a test sees what a sleep has lost. */
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int lines(void)
{
    FILE *file = fopen("/ledger", "a+");
    int count = 0, letter;
    if (!file) return -1;
    fputs("request\n", file);
    rewind(file);
    while ((letter = getc(file)) != EOF) count += letter == '\n';
    fclose(file);
    return count;
}

int main(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(8080)};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0), count = 0;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) return 1;
    for (;;) {
        char request[4096] = "", body[64], answer[256];
        size_t got = 0;
        ssize_t more = 1;
        int peer = accept(listener, NULL, NULL);
        while (!strstr(request, "\r\n\r\n") && got < sizeof request - 1 && (more = read(peer, request + got, sizeof request - 1 - got)) > 0)
            got += (size_t)more;
        if (more > 0) {
            snprintf(body, sizeof body, "%d %d", ++count, lines());
            int length = snprintf(answer, sizeof answer, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n%s", strlen(body), body);
            (void)!write(peer, answer, (size_t)length);
        }
        close(peer);
    }
}
