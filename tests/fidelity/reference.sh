# The reference: Debian 13's dockerd as it is, with BuildKit, containerd and runc, as root and outside our pipeline.
# $1 the root with its programs, $2 the local base's archive, $3 its name, $4 the work directory: contexts/NAME, with a Dockerfile, is built;
# the shell command `probe` runs in a container of each image that `names` lists; of `steps`, a context too, the directory /found of its image
# is taken. Answers are in out/: images.tar, NAME.log, NAME.json, found/.
set -eu
tools=$1 base=$2 name=$3 work=$4
mount --make-rprivate /
mount -t proc proc /proc
root=$work/jail
mkdir -p "$root" "$work/store" "$work/out"
mount -t tmpfs -o mode=755 jail "$root"
cd "$root"
mkdir -p usr etc proc sys dev tmp run var/lib/docker var/tmp work old
chmod 1777 tmp var/tmp
ln -s ../run var/run
for link in bin sbin lib lib64; do ln -s usr/$link $link; done
printf 'root:x:0:0::/run:/bin/sh\n' > etc/passwd
printf 'root:x:0:\n' > etc/group
mount --bind "$tools/usr" usr
mount --rbind /dev dev
mount --rbind /sys sys
mount --rbind /proc proc
mount --bind "$work/store" var/lib/docker
mount --bind "$work" work
: > base.tar
mount --bind "$base" base.tar
pivot_root . old
umount -l /old
cd /
export PATH=/usr/sbin:/usr/bin HOME=/run DOCKER_HOST=unix:///run/docker.sock
# As Debian's unit starts it (docker.service; systemd-system.conf(5) for files).
for limit in --nofile=1024:524288 --nofile=1024: --nproc=unlimited --core=unlimited; do prlimit --pid $$ $limit 2> /dev/null || :; done
dockerd --userland-proxy=false --iptables=false --ip6tables=false --ip-forward=false --storage-driver=overlay2 --cgroup-parent=/torpor-reference \
    --exec-opt native.cgroupdriver=cgroupfs --data-root=/var/lib/docker -H "$DOCKER_HOST" > /work/out/dockerd.log 2>&1 &
daemon=$!
tries=0
until docker version > /dev/null 2>&1; do
    tries=$((tries + 1))
    [ $tries -lt 600 ] && kill -0 $daemon || { cat /work/out/dockerd.log >&2; exit 1; }
    sleep 0.05
done
docker import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' /base.tar "$name" > /dev/null
made=
for context in /work/contexts/*/; do
    image=$(basename "$context")
    docker build --progress=plain --network=none --tag "reference/$image" "$context" > "/work/out/$image.log" 2>&1 || { cat "/work/out/$image.log" >&2; exit 1; }
    made="$made reference/$image"
done
docker build --progress=plain --tag reference/steps /work/steps > /work/out/steps.log 2>&1 || { cat /work/out/steps.log >&2; exit 1; }
docker create --name steps reference/steps > /dev/null
docker cp --quiet steps:/found /work/out/found
docker save -o /work/out/images.tar $made
for image in $(cat /work/names); do
    docker run --detach --network=none --name "reference-$image" "reference/$image" > /dev/null
    docker exec "reference-$image" sh -c "$(cat /work/probe)" > "/work/out/$image.json" || { cat "/work/out/$image.json" >&2; exit 1; }
    docker rm --force "reference-$image" > /dev/null
done
kill $daemon
wait $daemon || :
