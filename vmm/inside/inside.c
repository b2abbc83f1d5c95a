/* Tries, inside a microVM, what code that wants out would try first, and prints a line of JSON for each: what, whether it was done or
 * refused, and why. Static, so that it runs in any image: `torpor doctor --inside ID`. It changes nothing that stays. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define WAIT_MS 1500
#define SERVICES "169.254.169.254"

static void tell(const char *what, int is_done, const char *text)
{
    printf("{\"try\": \"%s\", \"done\": %s, \"text\": \"%s\"}\n", what, is_done ? "true" : "false", text);
    fflush(stdout);
}

static void result(const char *what, long outcome)
{
    tell(what, outcome >= 0, outcome >= 0 ? "" : strerror(errno));
}

/* The value of a field of this process's status, or of the processor's. */
static void field(const char *what, const char *file, const char *name)
{
    char line[4096], *value;
    FILE *of = fopen(file, "r");
    while (of && fgets(line, sizeof line, of))
        if (!strncmp(line, name, strlen(name)) && (value = strchr(line, ':'))) {
            value += strspn(value, ": \t");
            value[strcspn(value, "\n")] = 0;
            tell(what, 1, value);
            fclose(of);
            return;
        }
    if (of) fclose(of);
    tell(what, 0, "not said");
}

static void opened(const char *what, const char *path, int flags)
{
    int file = open(path, flags | O_CLOEXEC | O_NONBLOCK);
    result(what, file);
    if (file >= 0) close(file);
}

/* Read and not only opened: what lies over it may be empty. */
static void readable(const char *what, const char *path)
{
    char byte;
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    long got = file < 0 ? -1 : read(file, &byte, 1);
    if (got) result(what, got);
    else tell(what, 0, "empty");
    if (file >= 0) close(file);
}

/* A call with arguments that the kernel refuses when it looks at them: what it says then is that it has looked. */
static void looked_at(const char *what, long outcome)
{
    tell(what, outcome >= 0 || (errno != EPERM && errno != ENOSYS), outcome >= 0 ? "" : strerror(errno));
}

static int connected(const char *address, unsigned short port)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct pollfd one = {.events = POLLOUT};
    int error = 0;
    socklen_t length = sizeof error;
    inet_pton(AF_INET, address, &to.sin_addr);
    one.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (one.fd < 0) return -1;
    if (!connect(one.fd, (struct sockaddr *)&to, sizeof to)) return one.fd;
    if (errno == EINPROGRESS) {
        if (poll(&one, 1, WAIT_MS) == 1) getsockopt(one.fd, SOL_SOCKET, SO_ERROR, &error, &length);
        else error = ETIMEDOUT;
        if (!error) return one.fd;
        errno = error;
    }
    error = errno;
    close(one.fd);
    errno = error;
    return -1;
}

static void reached(const char *what, const char *address, unsigned short port)
{
    int one = connected(address, port);
    result(what, one);
    if (one >= 0) close(one);
}

/* Whether the metadata service gives anything to who has no token, or to who was forwarded. */
static void metadata(const char *what, const char *request)
{
    char answer[64] = {0};
    struct pollfd one = {.fd = connected(SERVICES, 80), .events = POLLIN};
    if (one.fd < 0) {
        result(what, -1);
        return;
    }
    if (write(one.fd, request, strlen(request)) > 0 && poll(&one, 1, WAIT_MS) == 1 && read(one.fd, answer, sizeof answer - 1) > 12) {
        answer[12] = 0;
        tell(what, !strncmp(answer + 9, "200", 3), answer);
    } else tell(what, 0, "no answer");
    close(one.fd);
}

static void device(void)
{
    const char *node = "/tmp/.torpor-inside";
    unlink(node);
    if (mknod(node, S_IFCHR | 0600, makedev(1, 1)) < 0) {
        result("make the node of memory", -1);
        return;
    }
    opened("make the node of memory", node, O_RDONLY);
    unlink(node);
}

int main(void)
{
    field("capabilities", "/proc/self/status", "CapEff");
    field("seccomp", "/proc/self/status", "Seccomp");
    field("no new privileges", "/proc/self/status", "NoNewPrivs");
    field("processor", "/proc/cpuinfo", "flags");
    opened("virtualisation", "/dev/kvm", O_RDWR);
    opened("memory", "/dev/mem", O_RDONLY);
    opened("ports", "/dev/port", O_RDONLY);
    readable("kernel's memory", "/proc/kcore");
    opened("core pattern", "/proc/sys/kernel/core_pattern", O_WRONLY);
    opened("sysrq", "/proc/sysrq-trigger", O_WRONLY);
    opened("a device's driver", "/sys/bus/pci/drivers/virtio-pci/unbind", O_WRONLY);
    opened("the machine's disk", "/dev/vda", O_RDWR);
    opened("the agent's channel", "/dev/vport0p1", O_RDWR);
    device();
    result("ports by iopl", syscall(SYS_iopl, 3));
    long mounted = mount("none", "/mnt", "tmpfs", 0, NULL);
    result("mount", mounted);
    if (mounted >= 0) umount2("/mnt", MNT_DETACH);
    result("trace the first process", ptrace(PTRACE_SEIZE, 1, NULL, NULL)); /* which does not stop it, and ends with this program */
    looked_at("module", syscall(SYS_init_module, "", 0L, ""));
    looked_at("bpf", syscall(SYS_bpf, 0, NULL, 0));
    result("raw socket", socket(AF_INET, SOCK_RAW, IPPROTO_ICMP));
    result("packet socket", socket(AF_PACKET, SOCK_RAW, 0));
    result("vsock", socket(AF_VSOCK, SOCK_STREAM, 0));
    metadata("metadata without a token", "GET /latest/meta-data/ HTTP/1.1\r\nHost: " SERVICES "\r\n\r\n");
    metadata("token for a proxy", "PUT /latest/api/token HTTP/1.1\r\nHost: " SERVICES
             "\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\nX-Forwarded-For: 192.0.2.1\r\nContent-Length: 0\r\n\r\n");
    reached("a private address", "10.0.0.1", 80);
    reached("a neighbour's link", "169.254.77.3", 80);
    reached("the host's end, ssh", SERVICES, 22);
    result("user namespace", unshare(CLONE_NEWUSER)); /* the last: all that follows would be tried from within */
    return 0;
}
