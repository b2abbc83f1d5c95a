/* The whole machine, for an application with all capabilities: devices, and control groups. */
#define _GNU_SOURCE
#include "whole.h"
#include "util.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define GROUPS "/sys/fs/cgroup"

/* /dev stays the kernel's own, where nodes come and go with their devices (a loop device's partitions, device mapper's). Those by which a module is
   asked for are there before it is (modules.devname of kmod(8)). */
void whole_devices(void)
{
    static const struct { const char *path; mode_t mode; unsigned major, minor; } nodes[] = {
        {"/dev/fuse", S_IFCHR | 0666, 10, 229}, {"/dev/net/tun", S_IFCHR | 0666, 10, 200}, {"/dev/loop-control", S_IFCHR | 0660, 10, 237},
        {"/dev/mapper/control", S_IFCHR | 0600, 10, 236}, {"/dev/btrfs-control", S_IFCHR | 0660, 10, 234},
        {"/dev/vhost-net", S_IFCHR | 0660, 10, 238},
    };
    mkdir("/dev/net", 0755);
    mkdir("/dev/mapper", 0755);
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++) {
        mknod(nodes[i].path, nodes[i].mode, makedev(nodes[i].major, nodes[i].minor));
        chmod(nodes[i].path, nodes[i].mode & 07777);
    }
    for (unsigned i = 0; i < 8; i++) {
        char path[32];
        snprintf(path, sizeof path, "/dev/loop%u", i);
        mknod(path, S_IFBLK | 0660, makedev(7, i));
    }
}

/* The root group, with every controller, to divide as one likes; without all capabilities it can only be read. */
void control_groups(int all_capabilities)
{
    const unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    if (mount("cgroup", GROUPS, "cgroup2", flags, NULL)) { say(GROUPS ": %s", strerror(errno)); return; }
    if (all_capabilities) put(GROUPS "/cgroup.subtree_control", "+cpuset +cpu +io +memory +pids");
    else if (mount(NULL, GROUPS, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | flags, NULL)) say(GROUPS ": %s", strerror(errno));
}
