/* The guest's network: fixed address, and one nftables ruleset, sent by netlink so that images need no `nft`:

     table ip torpor {
       chain in   { type nat hook prerouting priority -100; iif eth0 meta l4proto tcp dnat to 127.0.0.1 }
       chain back { type nat hook input priority 100;       ct status dnat snat to 127.0.0.1 } }

   Applications that listen on 127.0.0.1 only are reached too, and every peer is 127.0.0.1 (reference 3.1). */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_conntrack_common.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netlink.h>
#include <net/if.h>
#include <net/route.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define GUEST_ADDRESS "169.254.77.2"
#define NETMASK "255.255.255.252"

static uint8_t batch[4096] __attribute__((aligned(4)));
static size_t used;

static struct nlmsghdr *begin(uint16_t type, uint16_t flags, uint8_t family, uint16_t resource)
{
    struct nlmsghdr *header = (void *)(batch + used);
    struct nfgenmsg *generic = NLMSG_DATA(header);
    *header = (struct nlmsghdr){NLMSG_LENGTH(sizeof *generic), type, (uint16_t)(NLM_F_REQUEST | flags), 0, 0};
    *generic = (struct nfgenmsg){family, NFNETLINK_V0, htons(resource)};
    used += NLMSG_ALIGN(header->nlmsg_len);
    return header;
}

static void end(struct nlmsghdr *header) { header->nlmsg_len = (uint32_t)(batch + used - (uint8_t *)header); }

static struct nlattr *attribute(uint16_t type, const void *data, uint16_t length)
{
    struct nlattr *a = (void *)(batch + used);
    *a = (struct nlattr){(uint16_t)(NLA_HDRLEN + length), type};
    if (length) memcpy((uint8_t *)a + NLA_HDRLEN, data, length);
    used += NLA_ALIGN(a->nla_len);
    return a;
}

static void text(uint16_t type, const char *value) { attribute(type, value, (uint16_t)(strlen(value) + 1)); }
static void number(uint16_t type, uint32_t value) { value = htonl(value); attribute(type, &value, 4); }
static struct nlattr *nest(uint16_t type) { return attribute(type | NLA_F_NESTED, NULL, 0); }
static void close_nest(struct nlattr *a) { a->nla_len = (uint16_t)(batch + used - (uint8_t *)a); }

static void value(uint16_t type, const void *data, uint16_t length)
{
    struct nlattr *outer = nest(type);
    attribute(NFTA_DATA_VALUE, data, length);
    close_nest(outer);
}

static struct nlattr *element, *data;

static void expression(const char *name)
{
    element = nest(NFTA_LIST_ELEM);
    text(NFTA_EXPR_NAME, name);
    data = nest(NFTA_EXPR_DATA);
}

static void expression_end(void) { close_nest(data); close_nest(element); }

static void load_meta(uint32_t key)
{
    expression("meta"); number(NFTA_META_DREG, NFT_REG_1); number(NFTA_META_KEY, key); expression_end();
}

static void compare(uint32_t operator, const void *with, uint16_t length)
{
    expression("cmp"); number(NFTA_CMP_SREG, NFT_REG_1); number(NFTA_CMP_OP, operator); value(NFTA_CMP_DATA, with, length);
    expression_end();
}

static void translate(uint32_t kind)
{
    uint32_t loopback = htonl(INADDR_LOOPBACK);
    expression("immediate"); number(NFTA_IMMEDIATE_DREG, NFT_REG_1); value(NFTA_IMMEDIATE_DATA, &loopback, 4); expression_end();
    expression("nat"); number(NFTA_NAT_TYPE, kind); number(NFTA_NAT_FAMILY, NFPROTO_IPV4);
    number(NFTA_NAT_REG_ADDR_MIN, NFT_REG_1); expression_end();
}

static void chain(const char *name, uint32_t hook, int32_t priority)
{
    struct nlmsghdr *m = begin(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWCHAIN, NLM_F_CREATE, NFPROTO_IPV4, 0);
    text(NFTA_CHAIN_TABLE, "torpor");
    text(NFTA_CHAIN_NAME, name);
    text(NFTA_CHAIN_TYPE, "nat");
    struct nlattr *where = nest(NFTA_CHAIN_HOOK);
    number(NFTA_HOOK_HOOKNUM, hook);
    number(NFTA_HOOK_PRIORITY, (uint32_t)priority);
    close_nest(where);
    end(m);
}

static struct nlattr *rule(const char *name, struct nlmsghdr **message)
{
    *message = begin(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, NFPROTO_IPV4, 0);
    text(NFTA_RULE_TABLE, "torpor");
    text(NFTA_RULE_CHAIN, name);
    return nest(NFTA_RULE_EXPRESSIONS);
}

static void compose(void)
{
    struct nlmsghdr *m;
    struct nlattr *expressions;
    end(begin(NFNL_MSG_BATCH_BEGIN, 0, AF_UNSPEC, NFNL_SUBSYS_NFTABLES));
    m = begin(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE, NLM_F_CREATE, NFPROTO_IPV4, 0);
    text(NFTA_TABLE_NAME, "torpor");
    end(m);
    chain("in", NF_INET_PRE_ROUTING, -100);
    chain("back", NF_INET_LOCAL_IN, 100);

    uint32_t eth0 = if_nametoindex("eth0"), nothing = 0, translated = IPS_DST_NAT;
    uint8_t tcp = IPPROTO_TCP;
    expressions = rule("in", &m);
    load_meta(NFT_META_IIF); compare(NFT_CMP_EQ, &eth0, 4);
    load_meta(NFT_META_L4PROTO); compare(NFT_CMP_EQ, &tcp, 1);
    translate(NFT_NAT_DNAT);
    close_nest(expressions);
    end(m);

    expressions = rule("back", &m);
    expression("ct"); number(NFTA_CT_DREG, NFT_REG_1); number(NFTA_CT_KEY, NFT_CT_STATUS); expression_end();
    expression("bitwise"); number(NFTA_BITWISE_SREG, NFT_REG_1); number(NFTA_BITWISE_DREG, NFT_REG_1);
    number(NFTA_BITWISE_LEN, 4); value(NFTA_BITWISE_MASK, &translated, 4); value(NFTA_BITWISE_XOR, &nothing, 4); expression_end();
    compare(NFT_CMP_NEQ, &nothing, 4);
    translate(NFT_NAT_SNAT);
    close_nest(expressions);
    end(m);
    m = begin(NFNL_MSG_BATCH_END, NLM_F_ACK, AF_UNSPEC, NFNL_SUBSYS_NFTABLES);
    end(m);
}

void gate_open(void)
{
    compose();
    int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER);
    must(netlink, "netfilter");
    struct timeval patience = {2, 0};
    setsockopt(netlink, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    must((int)send(netlink, batch, used, 0), "nftables");
    uint8_t answer[1024] __attribute__((aligned(4)));
    ssize_t got = recv(netlink, answer, sizeof answer, 0);
    struct nlmsghdr *header = (void *)answer;
    if (got >= (ssize_t)NLMSG_LENGTH(sizeof(struct nlmsgerr)) && header->nlmsg_type == NLMSG_ERROR) {
        struct nlmsgerr *error = NLMSG_DATA(header);
        if (error->error) say("nftables: %s", strerror(-error->error));
    }
    close(netlink);
    put("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1");
}

static void address(int sock, const char *name, const char *ip)
{
    struct ifreq request = {0};
    struct sockaddr_in *in = (struct sockaddr_in *)&request.ifr_addr;
    snprintf(request.ifr_name, IFNAMSIZ, "%s", name);
    if (ip) {
        in->sin_family = AF_INET;
        inet_pton(AF_INET, ip, &in->sin_addr);
        if (ioctl(sock, SIOCSIFADDR, &request)) say("address %s: %s", name, strerror(errno));
        inet_pton(AF_INET, NETMASK, &in->sin_addr);
        if (ioctl(sock, SIOCSIFNETMASK, &request)) say("mask: %s", strerror(errno));
    }
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(sock, SIOCSIFFLAGS, &request)) say("up %s: %s", name, strerror(errno));
}

void network_up(void)
{
    int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    must(sock, "socket");
    put("/proc/sys/net/ipv6/conf/default/accept_ra", "0");
    put("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1"); /* there is no way out by it; it would look for routers */
    put("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    address(sock, "lo", NULL);
    address(sock, "eth0", GUEST_ADDRESS);
    struct rtentry route = {0};
    ((struct sockaddr_in *)&route.rt_dst)->sin_family = AF_INET;
    ((struct sockaddr_in *)&route.rt_genmask)->sin_family = AF_INET;
    ((struct sockaddr_in *)&route.rt_gateway)->sin_family = AF_INET;
    inet_pton(AF_INET, HOST_ADDRESS, &((struct sockaddr_in *)&route.rt_gateway)->sin_addr);
    route.rt_flags = RTF_UP | RTF_GATEWAY;
    if (ioctl(sock, SIOCADDRT, &route)) say("route: %s", strerror(errno));
    close(sock);
}
