"""What the kernel offers an application: with all capabilities, and with Docker's default ones."""

from typing import Any

from service import until

from fidelity.table import BASE, SERVER, Call, Get, Image, Logs, Run, Sleep, Subject

ALL = {"additionalOsCapabilities": ["ALL"]}
INSTALL = "RUN apt-get update -q && apt-get install -q -y --no-install-recommends "
SYSTEMD = (
    INSTALL + "systemd systemd-sysv dbus\nCOPY server /server\nCOPY server.service /etc/systemd/system/\n"
    'RUN systemctl enable server\nEXPOSE 8080\nCMD ["/sbin/init"]\n'
)
UNIT = "[Unit]\nDescription=The server\n[Service]\nExecStart=/server\n[Install]\nWantedBy=multi-user.target\n"


def loaded(*names: str) -> str:
    return f"grep -cE '^({'|'.join(names)}) ' /proc/modules"


def serve(daemon: str) -> str:
    return SERVER.replace('["/server"]', f'["/bin/sh", "-c", "{daemon} >/var/log/daemon.log 2>&1 & exec /server"]')


def docker_is_up(running: Any) -> None:
    """It was started by the image; how far it came before the snapshot is the processor's."""
    try:
        until(lambda: running.run("docker info")[0] == 0, 120, 1)
    except TimeoutError as error:
        raise AssertionError(running.run("tail -20 /var/log/daemon.log")[1]) from error


SUBJECT = Subject(
    "The kernel, and additionalOsCapabilities ALL",
    "With ALL a microVM is a machine: modules of its kernel (Debian's cloud kernel) are in /lib/modules and load when something asks for them, "
    "/dev and control groups are the kernel's own. Without it an application has what a container has by default, and nobody in the microVM "
    "can load a module.",
    [
        Image(
            "all-capabilities",
            "additionalOsCapabilities ALL",
            BASE + SERVER,
            [
                Run(
                    "no module is loaded that nobody asked for", loaded("fuse", "tun", "loop", "overlay", "bridge", "nf_conntrack"), "0", 1
                ),
                Run(
                    "FUSE, tun and loop devices are there",
                    ": <>/dev/fuse; : <>/dev/net/tun; : <>/dev/loop-control; ls /dev/loop0",
                    "/dev/loop0",
                ),
                Run("their modules were loaded by that", loaded("fuse", "tun", "loop"), "3"),
                Run(
                    "overlays, bridges and pairs of veth are made",
                    "mkdir -p /o/l /o/u /o/w /o/m && mount -t overlay o -o lowerdir=/o/l,upperdir=/o/u,workdir=/o/w /o/m && ip link add br0 type bridge && "
                    f"ip link add v0 type veth && {loaded('overlay', 'bridge', 'stp', 'llc', 'veth')}",
                    "5",
                ),
                Run(
                    "control groups (version 2) can be divided",
                    "mkdir /sys/fs/cgroup/mine && echo 64M > /sys/fs/cgroup/mine/memory.max && cat /sys/fs/cgroup/mine/memory.max",
                    "67108864",
                ),
                Sleep(),
                Run("modules load after a sleep, too", f": <>/dev/mapper/control; {loaded('dm_mod')}", "1"),
            ],
            request=ALL,
        ),
        Image(
            "default-capabilities",
            "Docker's default capabilities",
            BASE + SERVER,
            [
                Run(
                    "no module can be loaded",
                    "cat /proc/sys/kernel/modules_disabled /proc/sys/kernel/modprobe; ls /lib/modules",
                    "1\n.*",
                    2,
                ),
                Run("there is no device of FUSE's or tun's", "ls /dev/fuse /dev/net/tun 2>&1", ".*No such file.*No such file.*", 2),
                Run("control groups can be read", "grep -c memory /sys/fs/cgroup/cgroup.controllers", "1"),
                Run("and not changed", "mkdir /sys/fs/cgroup/mine", ".*Read-only file system", 1),
                Run("", "date -s @1 2>/proc/1/fd/2", ".*", 1),
                Logs(
                    "the log says what to do where an application is refused something", "not permitted.*\n.*additionalOsCapabilities ALL"
                ),
            ],
        ),
        Image(
            "docker",
            "dockerd in a microVM",
            BASE + INSTALL + "docker.io iptables busybox-static\n" + serve("dockerd"),
            [
                Call("", docker_is_up),
                Run(
                    "its storage is overlay2, its control groups version 2",
                    "docker info --format '{{.Driver}} {{.CgroupVersion}}'",
                    "overlay2 2",
                ),
                Run(
                    "`docker import`, `save` and `load` make images",
                    "mkdir -p /bb/bin && cp /bin/busybox /bb/bin/ && tar -C /bb -c . | docker import - bb:1 >/dev/null && docker save bb:1 | docker load",
                    "Loaded image: bb:1",
                ),
                Run(
                    "a container on the bridge reaches the outside by name",
                    "docker run --rm bb:1 /bin/busybox sh -c 'echo hello | busybox nc -w 10 example.com 7777'",
                    ".* hello",
                ),
                Run(
                    "limits are kept by the kernel",
                    "docker run --rm --memory 64m bb:1 /bin/busybox cat /sys/fs/cgroup/memory.max 2>/dev/null",
                    "67108864",
                ),
                Run(
                    "ports are published",
                    "docker run -d -p 9001:80 -p 127.0.0.1:9002:80 bb:1 /bin/busybox sh -c 'echo inside > /index.html; busybox httpd -f -p 80' >/dev/null",
                ),
                Get("and reached from the microVM's endpoint", "/", port=9001, contains="inside"),
                Get("also those of 127.0.0.1", "/", port=9002, contains="inside"),
                Sleep("containers sleep with their microVM"),
                Get("and answer after it", "/", port=9001, contains="inside"),
            ],
            note="`dockerd` is started by the image; registries are reached as the microVM's egress allows",
            request=ALL,
            long=True,
        ),
        Image(
            "systemd",
            "systemd as CMD",
            BASE + SYSTEMD,
            [
                Get("a unit's server answers", "/env", within=120),
                Run(
                    "units are started, `systemctl` answers",
                    "systemctl is-active server; systemctl is-system-running || true",
                    "active\n(running|degraded|starting)",
                ),
                Run(
                    "`systemctl status` shows the unit's group",
                    "systemctl status server | grep -o 'system.slice/server.service'",
                    ".*server.service",
                ),
            ],
            files={"server.service": UNIT},
            request=ALL,
            long=True,
        ),
        Image(
            "systemd-without",
            "systemd as CMD, without ALL",
            BASE + SYSTEMD,
            [
                Logs(
                    "the build's log says what it needs, beside what systemd writes on its console",
                    "systemd.*additionalOsCapabilities ALL",
                    build=True,
                )
            ],
            files={"server.service": UNIT},
            long=True,
        ),
        Image(
            "fuse",
            "FUSE: bindfs, fuse2fs, fuse-overlayfs",
            BASE + INSTALL + "bindfs fuse2fs fuse-overlayfs fuse3 e2fsprogs\n" + SERVER,
            [
                Run("bindfs", "mkdir /b && bindfs /etc /b && cat /b/hosts | head -1", "127.0.0.1.*"),
                Run(
                    "fuse2fs",
                    "truncate -s 20M /f && mke2fs -q /f && mkdir /m && fuse2fs -o fakeroot /f /m && echo yes > /m/x && cat /m/x",
                    "yes",
                ),
                Run(
                    "fuse-overlayfs",
                    "mkdir -p /o/l /o/u /o/w /o/m; fuse-overlayfs -o lowerdir=/o/l,upperdir=/o/u,workdir=/o/w /o/m 2>/dev/null && echo 1 > /o/m/x && ls /o/u",
                    "x",
                ),
                Sleep(),
                Run("they are mounted after a sleep", "cat /m/x /o/m/x", "yes\n1"),
            ],
            request=ALL,
            long=True,
        ),
        Image(
            "nfs",
            "NFS, of the kernel's own server",
            BASE + INSTALL + "nfs-kernel-server nfs-common e2fsprogs mount kmod\n" + SERVER,
            [
                Run(
                    "a server and a mount of its export (version 4)",
                    "truncate -s 20M /f && mke2fs -q /f && mkdir /export /n && mount -o loop /f /export && echo data > /export/a && "
                    "echo '/export 127.0.0.1(rw,fsid=0,no_root_squash,no_subtree_check,insecure)' > /etc/exports && rpcbind -w && "
                    "mount -t nfsd nfsd /proc/fs/nfsd && echo 10 > /proc/fs/nfsd/nfsv4gracetime && exportfs -ra && rpc.nfsd 1 && rpc.mountd && "
                    "mount -t nfs4 127.0.0.1:/ /n && cat /n/a",
                    ".*data",
                ),
                Run("version 3", "mount -t nfs -o vers=3,nolock 127.0.0.1:/export /mnt && echo more > /mnt/b && cat /export/b", "more"),
            ],
            request=ALL,
            long=True,
        ),
        Image(
            "network-devices",
            "tun, bridges, veth, network namespaces, iptables, WireGuard",
            BASE + INSTALL + "iproute2 iptables kmod mount e2fsprogs xfsprogs dmsetup\n" + SERVER,
            [
                Run("a tun device", "ip tuntap add t0 mode tun && ip -br link show t0", "t0 .*"),
                Run(
                    "a bridge, a pair of veth, a namespace",
                    "ip netns add n && ip link add br0 type bridge && ip link add v0 master br0 type veth peer name v1 netns n && "
                    "ip addr add 10.1.1.1/24 dev br0 && ip link set br0 up && ip link set v0 up && ip -n n addr add 10.1.1.2/24 dev v1 && "
                    "ip -n n link set v1 up && ip -n n route get 10.1.1.1",
                    ".*dev v1.*",
                ),
                Run("WireGuard", "ip link add wg0 type wireguard && ip -br link show wg0", "wg0 .*"),
                Run("NAT", "iptables -t nat -A POSTROUTING -s 10.1.1.0/24 -j MASQUERADE && iptables -t nat -S POSTROUTING", ".*MASQUERADE"),
                Run(
                    "a firewall that tracks connections",
                    "iptables -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT && iptables -A INPUT -i lo -j ACCEPT && "
                    "iptables -A INPUT -p tcp --dport 8080 -m conntrack --ctstate NEW -j ACCEPT && iptables -A OUTPUT -m conntrack --ctstate INVALID "
                    "-j DROP && iptables -P INPUT DROP",
                ),
                Run("lets in what it names", "true"),
                Run(
                    "",
                    'ip -n n route add default via 10.1.1.1 && echo 1 > /proc/sys/net/ipv4/ip_forward; hold() { (ip netns exec n bash -c "'
                    'exec 3<>/dev/tcp/$1 && echo open >> $2; cat <&3; echo over >> $2" >/dev/null 2>&1 &); '
                    "}; hold 198.51.100.7/7777 /out; hold 10.1.1.1/8080 /in; "
                    "for i in $(seq 100); do grep -qs open /out && grep -qs open /in && break; sleep 0.1; done; cat /out /in",
                    "open\nopen",
                ),
                Sleep(),
                Run(
                    "a namespace's connections to the outside are reset by a sleep",
                    "for i in $(seq 50); do grep -q over /out && break; sleep 0.1; done; cat /out",
                    "open\nover",
                ),
                Run("those within the microVM are not", "cat /in", "open"),
                Run(
                    "a loop device with XFS on it",
                    "truncate -s 400M /x && mkfs.xfs -q /x && mkdir /m && mount -o loop /x /m && stat -f -c %T /m",
                    "xfs",
                ),
                Run(
                    "overlay",
                    "mkdir -p /o/l /o/u /o/w /o/m && mount -t overlay o -o lowerdir=/o/l,upperdir=/o/u,workdir=/o/w /o/m && stat -f -c %T /o/m",
                    "overlayfs",
                ),
                Run("device mapper", "dmsetup create z --table '0 100 zero' && dmsetup table z", "0 100 zero"),
                Run("`modprobe`", "modprobe br_netfilter && ls /proc/sys/net/bridge | head -1", "bridge-nf-call-arptables"),
            ],
            request=ALL,
            long=True,
        ),
    ],
)
