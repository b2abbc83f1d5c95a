/* Which TCP sockets listen: told to the host, which says it in the microVM's log where a request found nothing at its port. */
#define _GNU_SOURCE
#include "listeners.h"
#include "port.h"

#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define TCP_LISTEN_ 10
#define LISTENERS_MAX 64

struct answer {
    uint64_t nonce;
    struct listener { uint16_t family, port; uint8_t address[16]; } listeners[LISTENERS_MAX];
};

static size_t add_family(struct answer *answer, size_t count, int diag, uint8_t family)
{
    struct { struct nlmsghdr header; struct inet_diag_req_v2 request; } dump = {
        .header = {sizeof dump, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, family, 0},
        .request = {.sdiag_family = family, .sdiag_protocol = IPPROTO_TCP, .idiag_states = 1u << TCP_LISTEN_},
    };
    static uint8_t buffer[32768] __attribute__((aligned(8)));
    if (send(diag, &dump, sizeof dump, 0) < 0) return count;
    for (;;) {
        ssize_t got = recv(diag, buffer, sizeof buffer, 0);
        if (got <= 0) return count;
        for (struct nlmsghdr *h = (void *)buffer; NLMSG_OK(h, (size_t)got); h = NLMSG_NEXT(h, got)) {
            if (h->nlmsg_type == NLMSG_DONE || h->nlmsg_type == NLMSG_ERROR) return count;
            if (count == LISTENERS_MAX) continue;
            struct inet_diag_msg *found = NLMSG_DATA(h);
            struct listener *one = &answer->listeners[count++];
            one->family = found->idiag_family == AF_INET ? 4 : 6;
            one->port = ntohs(found->id.idiag_sport);
            memcpy(one->address, found->id.idiag_src, sizeof one->address);
        }
    }
}

void listeners_send(const uint8_t *nonce)
{
    struct answer answer = {0};
    size_t count = 0;
    memcpy(&answer.nonce, nonce, sizeof answer.nonce);
    int diag = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
    if (diag >= 0) {
        count = add_family(&answer, count, diag, AF_INET);
        count = add_family(&answer, count, diag, AF_INET6);
        close(diag);
    }
    port_send(FRAME_LISTENING, 0, &answer, (uint32_t)(sizeof answer.nonce + count * sizeof(struct listener)));
}
