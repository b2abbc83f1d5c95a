/* The guest's network: fixed address, and what lets the host in: applications that listen on 127.0.0.1 only are reached too, and every
   peer is 127.0.0.1 (reference 3.1). Addresses are rewritten packet by packet, without connection tracking, which costs a guest a tenth
   of a wake. Sent by netlink, so that images need neither `nft` nor `ip`:

     table ip torpor {
       chain in   { type filter hook prerouting priority -50;
                    iif eth0 ip saddr,daddr HOST,GUEST tcp sport != 53 ip saddr,daddr set 127.0.0.1,127.0.0.1 meta mark set HOST_MARK }
       chain back { type filter hook output priority -300;
                    oif eth0 ip saddr 127.0.0.1 ip saddr,daddr set GUEST,HOST } }

   An application that tracks connections itself (dockerd, a firewall) sees both directions with the link's addresses, for its hooks lie
   outside of these two (NF_IP_PRI_CONNTRACK -200, NF_IP_PRI_NAT_DST -100); what it sends elsewhere, to a container, is left alone.

   Sockets take the mark of the connection's first packet (tcp_fwmark_accept), by which their answers leave through eth0, though
   they are for 127.0.0.1. The host's ports and the guest's own are of different ranges (vmm/network.py): no two connections look alike.

   The same over IPv6, for applications that listen on ::1 only: from HOST6 to GUEST6, rewritten to ::1. The guest's eth0 has no IPv6 address,
   so that it says nothing by itself, and resolvers see no IPv6; the kernel takes ::1 from eth0 by a local route over that very device. */
#define _GNU_SOURCE
#include "gate.h"
#include "util.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/fib_rules.h>
#include <linux/neighbour.h>
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

#define NETMASK "255.255.255.252"
#define HOST_ADDRESS6 "fd54:5250:52::1"
#define GUEST_ADDRESS6 "fd54:5250:52::2"
#define HOST_MAC {0x02, 0xfc, 0, 0, 0, 1} /* vmm/network.py */
#define HOST_MARK 0x54524f52u
#define HOST_TABLE 77
#define LOCAL_TABLE6 78
#define VALUE_MAX 16 /* of an immediate */
#define CHECKSUM 10 /* in an IPv4 header */

/* What differs between the two families: where source and destination stand in a header, and how long an address is. */
static const struct family {
    uint8_t number, netfilter;
    uint16_t addresses, length;
    const char *host, *guest, *loopback;
} ipv4 = {AF_INET, NFPROTO_IPV4, 12, 4, HOST_ADDRESS, GUEST_ADDRESS, "127.0.0.1"},
  ipv6 = {AF_INET6, NFPROTO_IPV6, 8, 16, HOST_ADDRESS6, GUEST_ADDRESS6, "::1"};

static uint8_t batch[8192] __attribute__((aligned(4)));
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

static void set_addresses(const struct family *family, const char *source, const char *destination)
{
    uint8_t both[32];
    inet_pton(family->number, source, both);
    inet_pton(family->number, destination, both + family->length);
    for (size_t at = 0; at < 2u * family->length; at += VALUE_MAX) {
        uint16_t length = (uint16_t)(2 * family->length - at < VALUE_MAX ? 2 * family->length - at : VALUE_MAX);
        expression("immediate"); number(NFTA_IMMEDIATE_DREG, NFT_REG_1); value(NFTA_IMMEDIATE_DATA, both + at, length); expression_end();
        expression("payload"); number(NFTA_PAYLOAD_SREG, NFT_REG_1); number(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER);
        number(NFTA_PAYLOAD_OFFSET, (uint32_t)(family->addresses + at)); number(NFTA_PAYLOAD_LEN, length);
        number(NFTA_PAYLOAD_CSUM_TYPE, family == &ipv4 ? NFT_PAYLOAD_CSUM_INET : NFT_PAYLOAD_CSUM_NONE); /* IPv6's header has none */
        number(NFTA_PAYLOAD_CSUM_OFFSET, CHECKSUM); number(NFTA_PAYLOAD_CSUM_FLAGS, NFT_PAYLOAD_L4CSUM_PSEUDOHDR); expression_end();
    }
}

static void chain(const struct family *family, const char *name, uint32_t hook, int32_t priority)
{
    struct nlmsghdr *m = begin(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWCHAIN, NLM_F_CREATE, family->netfilter, 0);
    text(NFTA_CHAIN_TABLE, "torpor");
    text(NFTA_CHAIN_NAME, name);
    text(NFTA_CHAIN_TYPE, "filter");
    struct nlattr *where = nest(NFTA_CHAIN_HOOK);
    number(NFTA_HOOK_HOOKNUM, hook);
    number(NFTA_HOOK_PRIORITY, (uint32_t)priority);
    close_nest(where);
    end(m);
}

static struct nlattr *rule(const struct family *family, const char *name, struct nlmsghdr **message)
{
    *message = begin(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, family->netfilter, 0);
    text(NFTA_RULE_TABLE, "torpor");
    text(NFTA_RULE_CHAIN, name);
    return nest(NFTA_RULE_EXPRESSIONS);
}

/* The source is the first address of a header, the destination the second. A comparison takes 16 bytes at most. */
static void compare_address(const struct family *family, uint32_t number_, const char *with)
{
    uint8_t address_[16];
    inet_pton(family->number, with, address_);
    load_header(NFT_PAYLOAD_NETWORK_HEADER, family->addresses + number_ * family->length, family->length);
    compare(NFT_CMP_EQ, address_, family->length);
}

static void compose_table(const struct family *family)
{
    struct nlmsghdr *m = begin(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE, NLM_F_CREATE, family->netfilter, 0);
    text(NFTA_TABLE_NAME, "torpor");
    end(m);
    chain(family, "in", NF_INET_PRE_ROUTING, -50);
    chain(family, "back", NF_INET_LOCAL_OUT, -300);

    uint32_t eth0 = if_nametoindex("eth0");
    uint8_t tcp = IPPROTO_TCP;
    uint16_t domain = htons(53);
    struct nlattr *expressions = rule(family, "in", &m);
    load_meta(NFT_META_IIF); compare(NFT_CMP_EQ, &eth0, 4);
    load_meta(NFT_META_L4PROTO); compare(NFT_CMP_EQ, &tcp, 1);
    compare_address(family, 0, family->host); compare_address(family, 1, family->guest);
    load_header(NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2); compare(NFT_CMP_NEQ, &domain, 2); /* the resolver's answers */
    set_addresses(family, family->loopback, family->loopback);
    set_mark(HOST_MARK);
    close_nest(expressions);
    end(m);

    expressions = rule(family, "back", &m);
    load_meta(NFT_META_OIF); compare(NFT_CMP_EQ, &eth0, 4);
    compare_address(family, 0, family->loopback);
    set_addresses(family, family->guest, family->host);
    close_nest(expressions);
    end(m);
}

static void compose(void)
{
    end(begin(NFNL_MSG_BATCH_BEGIN, 0, AF_UNSPEC, NFNL_SUBSYS_NFTABLES));
    compose_table(&ipv4);
    compose_table(&ipv6);
    end(begin(NFNL_MSG_BATCH_END, NLM_F_ACK, AF_UNSPEC, NFNL_SUBSYS_NFTABLES));
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
        errno = -error->error;
        must(error->error, what);
    }
    close(netlink);
    used = 0;
}

/* Adds to what is composed: all that is sent at once for one answer, to the last of it. */
static void change_rule(uint16_t type, uint8_t family, uint32_t priority, uint32_t table, uint32_t mark, const char *device)
{
    struct fib_rule_hdr rule_ = {.family = family, .action = FR_ACT_TO_TBL, .table = (uint8_t)table};
    struct nlmsghdr *m = begin_with(type, type == RTM_NEWRULE ? NLM_F_CREATE | NLM_F_EXCL : 0, &rule_, sizeof rule_);
    attribute(FRA_PRIORITY, &priority, 4);
    if (mark) attribute(FRA_FWMARK, &mark, 4);
    if (device) text(FRA_IIFNAME, device);
    end(m);
}

/* The local table is asked at 10 instead of 0, and before it, for what the guest sends with the mark, a table that leads to the host. */
static void change_rules(uint8_t family)
{
    change_rule(RTM_NEWRULE, family, 10, RT_TABLE_LOCAL, 0, NULL);
    change_rule(RTM_DELRULE, family, 0, RT_TABLE_LOCAL, 0, NULL);
    change_rule(RTM_NEWRULE, family, 1, HOST_TABLE, HOST_MARK, "lo");
}

static void add_route(uint8_t family, uint8_t type, uint8_t table, const char *to, const char *gateway)
{
    struct rtmsg route = {.rtm_family = family, .rtm_table = table, .rtm_protocol = RTPROT_STATIC, .rtm_type = type};
    uint8_t destination[16], way[16];
    uint32_t eth0 = if_nametoindex("eth0");
    if (to) route.rtm_dst_len = 128;
    struct nlmsghdr *m = begin_with(RTM_NEWROUTE, NLM_F_CREATE, &route, sizeof route);
    if (to) { inet_pton(family, to, destination); attribute(RTA_DST, destination, 16); }
    if (gateway) { inet_pton(family, gateway, way); attribute(RTA_GATEWAY, way, 4); }
    attribute(RTA_OIF, &eth0, 4);
    end(m);
}

/* Nobody is asked where the host is: eth0 has no IPv6 address to ask with. */
static void know_host(void)
{
    struct ndmsg neighbour = {.ndm_family = AF_INET6, .ndm_ifindex = (int)if_nametoindex("eth0"), .ndm_state = NUD_PERMANENT};
    uint8_t host[16], mac[] = HOST_MAC;
    inet_pton(AF_INET6, HOST_ADDRESS6, host);
    struct nlmsghdr *m = begin_with(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_ACK, &neighbour, sizeof neighbour);
    attribute(NDA_DST, host, sizeof host);
    attribute(NDA_LLADDR, mac, sizeof mac);
    end(m);
}

static void route_back(void)
{
    add_route(AF_INET, RTN_UNICAST, HOST_TABLE, NULL, HOST_ADDRESS);
    change_rules(AF_INET);
    add_route(AF_INET6, RTN_UNICAST, HOST_TABLE, "::1", NULL);
    add_route(AF_INET6, RTN_LOCAL, LOCAL_TABLE6, "::1", NULL);
    change_rules(AF_INET6);
    change_rule(RTM_NEWRULE, AF_INET6, 2, LOCAL_TABLE6, 0, "eth0");
    know_host();
    submit(NETLINK_ROUTE, "routes");
}

void gate_open(void)
{
    compose();
    submit(NETLINK_NETFILTER, "nftables");
    route_back();
    put("/proc/sys/net/ipv4/tcp_fwmark_accept", "1");
    put("/proc/sys/net/ipv4/fwmark_reflect", "1"); /* for what no socket answers */
    put("/proc/sys/net/ipv6/fwmark_reflect", "1");
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
    put("/proc/sys/net/ipv6/conf/eth0/addr_gen_mode", "1"); /* no address: there is no way out by it, and it would look for routers */
    put("/proc/sys/net/ipv6/conf/eth0/accept_ra", "0");
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
