# Makes the build's jail and enters it. $1 its root (an empty directory), $2 the first id of the builder's range, $3 the
# instance's build directory (store, runroot), $4 the context's tar archive, $5 the output directory, $6 the host's settings for RUN steps,
# $7 the base archive, $8 the script, $9 the logins, ${10} the kernel's modules for the image,
# or nothing; then files of cgroups up to "--"; the rest are the script's arguments.
set -eu
umask 022
root=$1 id=$2 store=$3 context=$4 out=$5 settings=$6 base=$7 script=$8 login=$9 modules=${10}
shift 10
while [ "$1" != -- ]; do echo $$ > "$1"; shift; done; shift

mount --make-rprivate /
mount -t tmpfs -o mode=755,size=64m torpor-build "$root"
cd "$root"
mkdir -p usr etc/containers proc sys dev/pts dev/shm tmp var/tmp run store runroot out buildhost old
chmod 1777 tmp var/tmp dev/shm
for link in bin sbin lib lib64; do ln -s usr/$link $link; done
mount --rbind /usr usr; mount -o remount,bind,ro usr
printf '{"default":[{"type":"insecureAcceptAnything"}]}\n' > etc/containers/policy.json
printf 'unqualified-search-registries = []\n' > etc/containers/registries.conf
printf 'root:x:0:0::/tmp:/bin/sh\nbuilder:x:%s:%s::/tmp:/bin/sh\n' "$id" "$id" > etc/passwd
printf 'root:x:0:\n' > etc/group
printf 'nameserver 10.0.2.3\n' > etc/resolv.conf
printf '127.0.0.1 localhost\n' > etc/hosts
printf 'root:%s:65536\n' "$id" > etc/subuid
printf 'root:%s:65536\n' "$id" > etc/subgid
cp /etc/ld.so.cache etc/
mkdir -p etc/ssl/certs; cp "$settings/registries.pem" etc/ssl/certs/ca-certificates.crt 2>/dev/null || :
if [ -d /etc/alternatives ]; then mkdir etc/alternatives; cp -P /etc/alternatives/* etc/alternatives/; fi
cp /etc/mke2fs.conf etc/ 2>/dev/null || :
for node in null zero full random urandom tty; do : > dev/$node; mount --bind /dev/$node dev/$node; done
ln -s /proc/self/fd dev/fd; ln -s pts/ptmx dev/ptmx
mount --bind "$store/store" store
mount --bind "$store/runroot" runroot
mount --bind "$store/tmp" var/tmp
mount --rbind /sys sys
touch ctx.tar; mount --bind "$context" ctx.tar; mount -o remount,bind,ro ctx.tar
mount --bind "$settings" buildhost
while read -r source target; do mount --bind "$source" "buildhost/$target"; mount -o remount,bind,ro "buildhost/$target"; done < "$settings/mounts"
mount -o remount,bind,ro buildhost
mount --bind "$out" out
: > base.tar; mount --bind "$base" base.tar; mount -o remount,bind,ro base.tar
if [ -n "$modules" ]; then mkdir modules; mount --bind "$modules" modules; mount -o remount,bind,ro modules; fi
cp "$login" auth.json; chown "$id:$id" auth.json; chmod 400 auth.json
: > build.sh; mount --bind "$script" build.sh; mount -o remount,bind,ro build.sh
chown "$id:$id" tmp var/tmp run out
mount --rbind /proc proc
pivot_root . old
umount -l /old
cd /
export HOME=/tmp USER=root XDG_RUNTIME_DIR=/run TMPDIR=/var/tmp BUILDAH_ISOLATION=chroot
export _CONTAINERS_USERNS_CONFIGURED=done _CONTAINERS_ROOTLESS_UID=$id _CONTAINERS_ROOTLESS_GID=$id
exec unshare --user --mount --pid --ipc --uts --fork --kill-child --map-users="$id,0,65536" --map-groups="$id,0,65536" \
    --setuid 0 --setgid 0 --mount-proc /bin/bash /build.sh "$@"
