/* A restored guest's connections to the outside, whose peers have forgotten them: ECONNABORTED now is better than silence (reference 2.5).
   What the host and the guest's own processes and containers talk to each other over is not touched. */
#define _GNU_SOURCE
#include "connections.h"
#include "app.h"
#include "gate.h"
#include "util.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define TCP_LISTEN_ 10
#define NAMESPACES_MAX 256

/* Sockets that ask for a network namespace's connections, and that end them. */
struct asker { int diag, reset; };

/* Open from the boot on, and so in every snapshot: what a freshly loaded guest does for the first time costs it most. */
static struct asker own;
static int way = -1;

static struct asker open_asker(void)
{
    return (struct asker){socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG), socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG)};
}

void connections_prepare(void)
{
    own = open_asker();
    must(own.diag < own.reset ? own.diag : own.reset, "sock_diag");
    must(way = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket");
}

/* 0 for a peer that is reached by IPv6: there is no way out by that. */
static uint32_t ipv4(const struct inet_diag_msg *message)
{
    const uint32_t *peer = message->id.idiag_dst;
    if (message->idiag_family == AF_INET) return peer[0];
    return !peer[0] && !peer[1] && peer[2] == htonl(0xffff) ? peer[3] : 0;
}

/* Whether what is sent there leaves the guest: asked of the routes, by a socket that sends nothing. */
static int leads_out(uint32_t address)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(9), .sin_addr = {address}}, from;
    static const struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
    socklen_t length = sizeof from;
    if (!address || (ntohl(address) >> 24) == 127) return 0;
    (void)!connect(way, &nowhere, sizeof nowhere); /* or the source stays as it was chosen for the last one */
    if (connect(way, (struct sockaddr *)&to, sizeof to) || getsockname(way, (struct sockaddr *)&from, &length)) return 0;
    return from.sin_addr.s_addr == inet_addr(GUEST_ADDRESS);
}

static void destroy(const struct asker *asker, const struct inet_diag_msg *message)
{
    struct { struct nlmsghdr header; struct inet_diag_req_v2 request; } kill_ = {
        .header = {sizeof kill_, SOCK_DESTROY, NLM_F_REQUEST, 0, 0},
        .request = {.sdiag_family = message->idiag_family, .sdiag_protocol = IPPROTO_TCP, .id = message->id},
    };
    (void)!send(asker->reset, &kill_, sizeof kill_, 0);
}

static void reset_family(const struct asker *asker, uint8_t family, uint32_t spared)
{
    static uint32_t number;
    number++;
    struct { struct nlmsghdr header; struct inet_diag_req_v2 request; } dump = {
        .header = {sizeof dump, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, number, 0},
        .request = {.sdiag_family = family, .sdiag_protocol = IPPROTO_TCP, .idiag_states = ~(1u << TCP_LISTEN_)},
    };
    if (send(asker->diag, &dump, sizeof dump, 0) < 0) return;
    static uint8_t buffer[32768] __attribute__((aligned(8)));
    for (;;) {
        ssize_t got = recv(asker->diag, buffer, sizeof buffer, 0);
        if (got <= 0) return;
        for (struct nlmsghdr *h = (void *)buffer; NLMSG_OK(h, (size_t)got); h = NLMSG_NEXT(h, got)) {
            if (h->nlmsg_seq != number) continue; /* the rest of an earlier answer */
            if (h->nlmsg_type == NLMSG_DONE || h->nlmsg_type == NLMSG_ERROR) return;
            struct inet_diag_msg *message = NLMSG_DATA(h);
            uint32_t peer = ipv4(message);
            if (peer != spared && leads_out(peer)) destroy(asker, message);
        }
    }
}

static void reset_all(const struct asker *asker, uint32_t spared)
{
    reset_family(asker, AF_INET, spared);
    reset_family(asker, AF_INET6, spared);
    uint8_t refusal[256];
    while (recv(asker->reset, refusal, sizeof refusal, MSG_DONTWAIT) > 0) {}
}

/* Containers' network namespaces, which an application with all capabilities may have made. Their peer that is the host is one of the
   endpoint's connections, to a port that a container publishes. */
static void reset_others(void)
{
    static ino_t seen[NAMESPACES_MAX];
    size_t count = 0;
    struct stat found;
    int ours = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    DIR *processes = opendir("/proc");
    if (ours < 0 || !processes || fstat(ours, &found)) goto out;
    seen[count++] = found.st_ino;
    for (struct dirent *entry; (entry = readdir(processes)) && count < NAMESPACES_MAX;) {
        char path[NAME_MAX + 16];
        size_t known = 0;
        if (*entry->d_name < '1' || *entry->d_name > '9') continue;
        snprintf(path, sizeof path, "/proc/%s/ns/net", entry->d_name);
        if (stat(path, &found)) continue;
        while (known < count && seen[known] != found.st_ino) known++;
        if (known < count) continue;
        seen[count++] = found.st_ino;
        int other = open(path, O_RDONLY | O_CLOEXEC);
        if (other < 0 || setns(other, CLONE_NEWNET)) { close(other); continue; }
        struct asker asker = open_asker();
        must(setns(ours, CLONE_NEWNET), "setns");
        reset_all(&asker, inet_addr(HOST_ADDRESS));
        close(asker.diag); close(asker.reset); close(other);
    }
out:
    if (processes) closedir(processes);
    close(ours);
}

void connections_reset(void)
{
    reset_all(&own, 0);
    if (app_is_whole) reset_others();
}
