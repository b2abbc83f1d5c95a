/* What a restored guest must put right: the wall clock, the kernel's randomness, and outbound connections. */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/random.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define TCP_ESTABLISHED_ 1
#define TCP_LISTEN_ 10

/* Open from the boot on, and so in every snapshot: what a freshly loaded guest does for the first time costs it most. */
static int random_ = -1, diag = -1, reset = -1;

void wake_prepare(void)
{
    random_ = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    diag = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
    reset = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
    must(random_, "open /dev/urandom");
    must(diag < reset ? diag : reset, "sock_diag");
}

static void set_clock(uint64_t wall_ns)
{
    struct timespec now = {(time_t)(wall_ns / 1000000000), (long)(wall_ns % 1000000000)};
    if (wall_ns && clock_settime(CLOCK_REALTIME, &now)) say("clock: %s", strerror(errno));
}

static void reseed(const uint8_t *entropy, size_t size)
{
    struct { struct rand_pool_info info; uint8_t bytes[64]; } pool = {.info = {.entropy_count = (int)size * 8, .buf_size = (int)size}};
    memcpy(pool.info.buf, entropy, size);
    if (ioctl(random_, RNDADDENTROPY, &pool) || ioctl(random_, RNDRESEEDCRNG)) say("random: %s", strerror(errno));
}

static int is_loopback(int family, const uint32_t *address)
{
    if (family == AF_INET) return (ntohl(address[0]) >> 24) == 127;
    static const uint32_t loopback[4] = {0, 0, 0, 0x01000000};
    if (!memcmp(address, loopback, 16)) return 1;
    return address[0] == 0 && address[1] == 0 && address[2] == htonl(0xffff) && (ntohl(address[3]) >> 24) == 127;
}

static void destroy(const struct inet_diag_msg *message)
{
    struct { struct nlmsghdr header; struct inet_diag_req_v2 request; } kill_ = {
        .header = {sizeof kill_, SOCK_DESTROY, NLM_F_REQUEST, 0, 0},
        .request = {.sdiag_family = message->idiag_family, .sdiag_protocol = IPPROTO_TCP, .id = message->id},
    };
    (void)!send(reset, &kill_, sizeof kill_, 0);
}

/* Peers outside have forgotten these connections: ECONNABORTED now is better than silence (reference 2.5). Connections
   from the host were translated to loopback and are not touched. */
static void reset_family(uint8_t family)
{
    static uint32_t number;
    number++;
    struct { struct nlmsghdr header; struct inet_diag_req_v2 request; } dump = {
        .header = {sizeof dump, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, number, 0},
        .request = {.sdiag_family = family, .sdiag_protocol = IPPROTO_TCP, .idiag_states = ~(1u << TCP_LISTEN_)},
    };
    if (send(diag, &dump, sizeof dump, 0) < 0) return;
    static uint8_t buffer[32768] __attribute__((aligned(8)));
    for (;;) {
        ssize_t got = recv(diag, buffer, sizeof buffer, 0);
        if (got <= 0) return;
        for (struct nlmsghdr *h = (void *)buffer; NLMSG_OK(h, (size_t)got); h = NLMSG_NEXT(h, got)) {
            if (h->nlmsg_seq != number) continue; /* the rest of an earlier answer */
            if (h->nlmsg_type == NLMSG_DONE || h->nlmsg_type == NLMSG_ERROR) return;
            struct inet_diag_msg *message = NLMSG_DATA(h);
            if (!is_loopback(message->idiag_family, message->id.idiag_dst)) destroy(message);
        }
    }
}

static void forget_refusals(void)
{
    uint8_t refusal[256];
    while (recv(reset, refusal, sizeof refusal, MSG_DONTWAIT) > 0) {}
}

void wake_up(const struct wake *wake)
{
    set_clock(wake->wall_ns);
    reseed(wake->entropy, sizeof wake->entropy);
    if (!wake->reset_tcp) return;
    reset_family(AF_INET);
    reset_family(AF_INET6);
    forget_refusals();
}
