# Makes the build's jail and enters it. $1 its root (an empty directory), $2 and $3 the ids that are mapped (arguments of unshare(1) for
# users, and for groups), $4 the first id, $5 how many, $6 the root with BuildKit, $7 the account's store, $8 the pipe that takes the phases'
# names, one a line, $9 the Dockerfile, then the output directory, the host's settings for RUN steps, the base archive, the directory of
# these scripts, the kernel's modules for the image, or nothing, and how many blocks of 4 KiB the build may add to the store; then files of
# cgroups up to "--"; the rest are arguments of build.sh. Ends with 75 when the store is of no use, as that does.
# Standard input is the context's tar archive: dash knows descriptors of one digit only, so that becomes 4, and the pipe 3.
set -eu
exec 4<&0 3> "$8" < /dev/null
umask 022
root=$1 users=$2 groups=$3 id=$4 count=$5 tools=$6 store=$7 dockerfile=$9
shift 9
out=$1 settings=$2 base=$3 scripts=$4 modules=$5 room=$6
shift 6
groups_joined=
while [ "$1" != -- ]; do echo $$ > "$1"; groups_joined="$groups_joined ${1%/*}"; shift; done; shift
# Steps have the limits of Docker's, by its unit and by systemd (systemd-system.conf(5)): vmm's own are others. None may be raised where
# the host's root may not.
for limit in --nofile=1024:524288 --nofile=1024: --nproc=unlimited --core=unlimited; do prlimit --pid $$ $limit 2>/dev/null || :; done
# A step binds any port, as Docker's do (`nginx -t`), and pings: its root has no rights over this network, which the host's root made.
echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start
echo '0 2147483647' > /proc/sys/net/ipv4/ping_group_range

mount --make-rprivate /
mount -t tmpfs -o mode=755,size=64m torpor-build "$root"
cd "$root"
mkdir -p usr bound etc/ssl/certs proc sys dev/pts dev/shm tmp var/lib/docker var/tmp run out lent old
chmod 1777 tmp var/tmp dev/shm
ln -s ../run var/run
for link in bin sbin lib lib64; do ln -s usr/$link $link; done
printf 'root:x:0:0::/run:/bin/sh\nbuilder:x:%s:%s::/run:/bin/sh\n' "$id" "$id" > etc/passwd
printf 'root:x:0:\n' > etc/group
printf 'nameserver 10.0.2.3\n' > etc/resolv.conf
printf '127.0.0.1 localhost\n' > etc/hosts
printf 'root:%s:%s\n' "$id" "$count" > etc/subuid
printf 'root:%s:%s\n' "$id" "$count" > etc/subgid
cp "$settings/registries.pem" etc/ssl/certs/ca-certificates.crt 2>/dev/null || :
bind() { mount --bind "$1" "$2"; mount -o remount,bind,ro "$2"; }
bind_file() { : > "$2"; bind "$1" "$2"; }
bind "$tools/usr" usr
for node in null zero full random urandom tty; do : > dev/$node; mount --bind /dev/$node dev/$node; done
ln -s /proc/self/fd dev/fd; ln -s pts/ptmx dev/ptmx
# A store with a bound is a file system in a file. What the host's disk has no room for is kept back in it (Linux's
# Documentation/ABI/testing/sysfs-fs-ext4), so that a step is told so, and no write that it was promised fails later.
device=
if [ -d "$store" ]; then mount --bind "$store" var/lib/docker; else
    mount -t ext4 -o loop,discard,noinit_itable "$store" var/lib/docker || {
        echo "torpor: the account's layer store cannot be mounted; where this host has no loop device, images.store_mib = 0 does without"
        exit 75
    }
    device=$(findmnt -n -o SOURCE var/lib/docker)
    free=$(stat -f -c %f var/lib/docker)
    [ "$free" -le "$room" ] || echo $((free - room)) > "/sys/fs/ext4/${device##*/}/reserved_clusters"
fi
mount --bind "$out" out
# Mounted here, it shows the build's network, and not the host's. dockerd finds the host's control groups there, a step (/step-sys) the
# build's own, and of no other.
mkdir step-sys
for place in sys step-sys; do mount -t sysfs -o ro,nosuid,nodev,noexec sysfs $place; done
mount --rbind /sys/fs/cgroup sys/fs/cgroup
own=step-sys/fs/cgroup
[ -e /sys/fs/cgroup/cgroup.controllers ] || mount -t tmpfs -o mode=755 torpor-build $own
for group in $groups_joined; do
    place=$own
    [ -e /sys/fs/cgroup/cgroup.controllers ] || { place=${group#/sys/fs/cgroup/} && place=$own/${place%%/*} && mkdir -p "$place"; }
    mount --bind "$group" "$place"
    mount -o remount,bind,ro,nosuid,nodev,noexec "$place"
done
mount -o remount,bind,ro,nosuid,nodev,noexec $own
mount --bind "$settings" lent
while read -r source target; do bind "$source" "lent/$target"; done < "$settings/mounts"
mount -o remount,bind,ro lent
if [ -n "$modules" ]; then mkdir modules; bind "$modules" modules; fi
bind_file "$dockerfile" Dockerfile
bind_file "$base" base.tar
bind_file "$scripts/build.sh" build.sh
bind_file "$scripts/build-runc.sh" bound/runc
chown "$id:$id" tmp var/tmp run
mount --rbind /proc proc
pivot_root . old
umount -l /old
cd /
# $users and $groups are lists of words.
status=0
unshare --user --mount --pid --ipc --uts --cgroup --fork --kill-child $users $groups --setuid 0 --setgid 0 --mount-proc /bin/sh /build.sh "$@" || status=$?
# What was removed last is not given back by `discard`: a file system that is being unmounted does no more of that.
[ -z "$device" ] || fstrim /var/lib/docker 2> /dev/null || :
exit $status
