/* What a restored guest must put right: the wall clock, the kernel's randomness, and outbound connections. */
#define _GNU_SOURCE
#include "wake.h"
#include "connections.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

/* Open from the boot on, and so in every snapshot: what a freshly loaded guest does for the first time costs it most. */
static int random_ = -1;

void wake_prepare(void)
{
    random_ = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    must(random_, "open /dev/urandom");
    connections_prepare();
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

/* A host whose message may have been lost asks again: what was done is not done twice, for the connections that it resets would by then
   be new ones. */
int wake_up(const struct wake *wake)
{
    static uint64_t carried_out;
    static int is_any;
    if (is_any && wake->nonce == carried_out) return 0;
    carried_out = wake->nonce;
    is_any = 1;
    set_clock(wake->wall_ns);
    reseed(wake->entropy, sizeof wake->entropy);
    if (wake->reset_tcp) connections_reset();
    return 1;
}
