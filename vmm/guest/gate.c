/* The guest's network: fixed address, and what lets the host in: applications that listen on 127.0.0.1 only are reached too, and every
   peer is 127.0.0.1 (reference 3.1). Addresses are rewritten packet by packet, without connection tracking, which costs a guest a tenth
   of a wake. Sent by netlink, so that images need neither `nft` nor `ip`:

     table ip torpor {
       chain in   { type filter hook prerouting priority -300;
                    iif eth0 ip saddr HOST tcp sport != 53 ip saddr,daddr set 127.0.0.1,127.0.0.1 meta mark set HOST_MARK }
       chain back { type filter hook postrouting priority 300;
                    oif eth0 ip saddr 127.0.0.1 ip saddr,daddr set GUEST,HOST } }

   Sockets take the mark of the connection's first packet (tcp_fwmark_accept), by which their answers leave through eth0, though
   they are for 127.0.0.1. The host's ports and the guest's own are of different ranges (vmm/network.py): no two connections look alike. */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/fib_rules.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
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
#define HOST_MARK 0x54524f52u
#define HOST_TABLE 77
#define ADDRESSES 12 /* in an IPv4 header: source and destination */
#define CHECKSUM 10

static uint8_t batch[4096] __attribute__((aligned(4)));
static size_t used;

static struct nlmsghdr *begin_with(uint16_t type, uint16_t flags, const void *body, size_t size)
{
    struct nlmsghdr *header = (void *)(batch + used);
    *header = (struct nlmsghdr){(uint32_t)NLMSG_LENGTH(size), type, (uint16_t)(NLM_F_REQUEST | flags), 0, 0};
    memcpy(NLMSG_DATA(header), body, size);
    used += NLMSG_ALIGN(header->nlmsg_len);
    return header;
}

static struct nlmsghdr *begin(uint16_t type, uint16_t flags, uint8_t family, uint16_t resource)
{
    struct nfgenmsg generic = {family, NFNETLINK_V0, htons(resource)};
    return begin_with(type, flags, &generic, sizeof generic);
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

static void set_mark(uint32_t mark)
{
    expression("immediate"); number(NFTA_IMMEDIATE_DREG, NFT_REG_1); value(NFTA_IMMEDIATE_DATA, &mark, 4); expression_end();
    expression("meta"); number(NFTA_META_SREG, NFT_REG_1); number(NFTA_META_KEY, NFT_META_MARK); expression_end();
}

static void load_header(uint32_t base, uint32_t offset, uint32_t length)
{
    expression("payload"); number(NFTA_PAYLOAD_DREG, NFT_REG_1); number(NFTA_PAYLOAD_BASE, base);
    number(NFTA_PAYLOAD_OFFSET, offset); number(NFTA_PAYLOAD_LEN, length); expression_end();
}

static void compare(uint32_t operator, const void *with, uint16_t length)
{
    expression("cmp"); number(NFTA_CMP_SREG, NFT_REG_1); number(NFTA_CMP_OP, operator); value(NFTA_CMP_DATA, with, length);
    expression_end();
}

static void set_addresses(const char *source, const char *destination)
{
    struct in_addr both[2];
    inet_aton(source, &both[0]);
    inet_aton(destination, &both[1]);
    expression("immediate"); number(NFTA_IMMEDIATE_DREG, NFT_REG_1); value(NFTA_IMMEDIATE_DATA, both, 8); expression_end();
    expression("payload"); number(NFTA_PAYLOAD_SREG, NFT_REG_1); number(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER);
    number(NFTA_PAYLOAD_OFFSET, ADDRESSES); number(NFTA_PAYLOAD_LEN, 8); number(NFTA_PAYLOAD_CSUM_TYPE, NFT_PAYLOAD_CSUM_INET);
    number(NFTA_PAYLOAD_CSUM_OFFSET, CHECKSUM); number(NFTA_PAYLOAD_CSUM_FLAGS, NFT_PAYLOAD_L4CSUM_PSEUDOHDR); expression_end();
}

static void chain(const char *name, uint32_t hook, int32_t priority)
{
    struct nlmsghdr *m = begin(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWCHAIN, NLM_F_CREATE, NFPROTO_IPV4, 0);
    text(NFTA_CHAIN_TABLE, "torpor");
    text(NFTA_CHAIN_NAME, name);
    text(NFTA_CHAIN_TYPE, "filter");
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
    chain("in", NF_INET_PRE_ROUTING, -300);
    chain("back", NF_INET_POST_ROUTING, 300);

    uint32_t eth0 = if_nametoindex("eth0");
    struct in_addr host, loopback = {htonl(INADDR_LOOPBACK)};
    uint8_t tcp = IPPROTO_TCP;
    uint16_t domain = htons(53);
    inet_aton(HOST_ADDRESS, &host);
    expressions = rule("in", &m);
    load_meta(NFT_META_IIF); compare(NFT_CMP_EQ, &eth0, 4);
    load_meta(NFT_META_L4PROTO); compare(NFT_CMP_EQ, &tcp, 1);
    load_header(NFT_PAYLOAD_NETWORK_HEADER, ADDRESSES, 4); compare(NFT_CMP_EQ, &host, 4);
    load_header(NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2); compare(NFT_CMP_NEQ, &domain, 2); /* the resolver's answers */
    set_addresses("127.0.0.1", "127.0.0.1");
    set_mark(HOST_MARK);
    close_nest(expressions);
    end(m);

    expressions = rule("back", &m);
    load_meta(NFT_META_OIF); compare(NFT_CMP_EQ, &eth0, 4);
    load_header(NFT_PAYLOAD_NETWORK_HEADER, ADDRESSES, 4); compare(NFT_CMP_EQ, &loopback, 4);
    set_addresses(GUEST_ADDRESS, HOST_ADDRESS);
    close_nest(expressions);
    end(m);
    m = begin(NFNL_MSG_BATCH_END, NLM_F_ACK, AF_UNSPEC, NFNL_SUBSYS_NFTABLES);
    end(m);
}

/* Sends what was composed. Only the last message asks for an answer, so the first that comes is that one, or an error. */
static void submit(int protocol, const char *what)
{
    int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
    must(netlink, what);
    struct timeval patience = {2, 0};
    setsockopt(netlink, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    must((int)send(netlink, batch, used, 0), what);
    uint8_t answer[1024] __attribute__((aligned(4)));
    ssize_t got = recv(netlink, answer, sizeof answer, 0);
    struct nlmsghdr *header = (void *)answer;
    if (got >= (ssize_t)NLMSG_LENGTH(sizeof(struct nlmsgerr)) && header->nlmsg_type == NLMSG_ERROR) {
        struct nlmsgerr *error = NLMSG_DATA(header);
        if (error->error) say("%s: %s", what, strerror(-error->error));
    }
    close(netlink);
    used = 0;
}

/* The local table is asked at 10 instead of 0, and before it, for what the guest sends with the mark, a table that leads to the host. */
static void change_rule(uint16_t type, uint32_t priority, uint32_t table, uint32_t mark)
{
    struct fib_rule_hdr rule = {.family = AF_INET, .action = FR_ACT_TO_TBL, .table = (uint8_t)table};
    struct nlmsghdr *m = begin_with(type, NLM_F_ACK | (type == RTM_NEWRULE ? NLM_F_CREATE | NLM_F_EXCL : 0), &rule, sizeof rule);
    attribute(FRA_PRIORITY, &priority, 4);
    if (mark) { attribute(FRA_FWMARK, &mark, 4); text(FRA_IIFNAME, "lo"); }
    end(m);
    submit(NETLINK_ROUTE, "rule");
}

static void route_back(void)
{
    struct rtmsg route = {.rtm_family = AF_INET, .rtm_table = HOST_TABLE, .rtm_protocol = RTPROT_STATIC, .rtm_type = RTN_UNICAST};
    struct nlmsghdr *m = begin_with(RTM_NEWROUTE, NLM_F_ACK | NLM_F_CREATE, &route, sizeof route);
    struct in_addr host;
    uint32_t eth0 = if_nametoindex("eth0");
    inet_aton(HOST_ADDRESS, &host);
    attribute(RTA_GATEWAY, &host, 4);
    attribute(RTA_OIF, &eth0, 4);
    end(m);
    submit(NETLINK_ROUTE, "route");
    change_rule(RTM_NEWRULE, 10, RT_TABLE_LOCAL, 0);
    change_rule(RTM_DELRULE, 0, RT_TABLE_LOCAL, 0);
    change_rule(RTM_NEWRULE, 1, HOST_TABLE, HOST_MARK);
}

void gate_open(void)
{
    compose();
    submit(NETLINK_NETFILTER, "nftables");
    route_back();
    put("/proc/sys/net/ipv4/tcp_fwmark_accept", "1");
    put("/proc/sys/net/ipv4/fwmark_reflect", "1"); /* for what no socket answers */
    put("/proc/sys/net/ipv4/conf/eth0/accept_local", "1");
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
