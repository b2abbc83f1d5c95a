# Runs inside the build's jail as root of its user namespace, first process of its PID namespace: what it starts ends with it. $1 the
# local base's name (empty: none), $2 what the base archive was made from, $3 the disk's bytes, $4 the MiB of cache that stay, $5 the KiB
# of the host's disk that are kept free. Descriptor 3 takes the phases' names, 4 is the context's tar archive. Ends with 75 when the store
# is of no use: it is made afresh then.
set -eu
umask 022
name=$1 key=$2 bytes=$3 cache=$4 kept=$5
export PATH=/bound:/usr/sbin:/usr/bin HOME=/run XDG_RUNTIME_DIR=/run DOCKER_HOST=unix:///run/docker.sock DOCKER_CONFIG=/out/login
export LIBMOUNT_FORCE_MOUNT2=always # fsconfig(2) takes 256 bytes, a list of layers may be 4096
store=/var/lib/docker made=localhost/torpor/build
phase() { echo "$1" >&3; }
# The kernel's modules, for an image that has all capabilities. Nothing runs in the image now: what is no link stays none.
add_modules() {
    lib=$1/lib
    case "$(readlink "$lib" || :)" in usr/lib|/usr/lib|./usr/lib) lib=$1/usr/lib;; esac
    for path in "$1/usr" "$lib" "$lib/modules"; do
        if [ -L "$path" ] || { [ -e "$path" ] && [ ! -d "$path" ]; }; then
            echo "torpor: ${path#"$1"} of the image is no directory: the kernel's modules are not put there, and none can be loaded"
            return
        fi
    done
    mkdir -p "$lib/modules"
    for release in /modules/*; do rm -rf "$lib/modules/${release##*/}"; done
    cp -r /modules/. "$lib/modules"
}
# Names give no build a right to what another made; what was built stays in the cache, up to its bound.
trim() {
    docker image rm --force $made > /dev/null 2>&1 || :
    docker image prune --force > /dev/null 2>&1 || :
    docker builder prune --force --keep-storage "${cache}MB" > /dev/null 2>&1 || :
    kill $daemon
    wait $daemon || :
}
store_fails() { sed 's/^/torpor: /' /run/dockerd.log; exit 75; }

phase BASE
containerd --root /run/containerd/root --state /run/containerd/state --address /run/containerd/socket --log-level error \
    > /run/containerd.log 2>&1 3>&- 4<&- &
# A build's log is kept whole.
BUILDKIT_STEP_LOG_MAX_SIZE=-1 BUILDKIT_STEP_LOG_MAX_SPEED=-1 dockerd --rootless --containerd /run/containerd/socket --bridge=none \
    --iptables=false --ip6tables=false --ip-forward=false --userland-proxy=false --storage-driver=overlay2 --exec-opt native.cgroupdriver=cgroupfs \
    --exec-root=/run/docker -H "$DOCKER_HOST" --log-level warn > /run/dockerd.log 2>&1 3>&- 4<&- &
daemon=$!
# Here root owns what root is to own, links lead nowhere but below this root, and every mode may be as the archive has it.
mkdir /out/context /out/dockerfile
tar -C /out/context --warning=no-timestamp --delay-directory-restore -xpf - <&4
exec 4<&-
cp /Dockerfile /out/dockerfile/Dockerfile
cp /out/context/Dockerfile.dockerignore /out/dockerfile/ 2>/dev/null || :
tries=0
until docker version > /dev/null 2>&1; do
    tries=$((tries + 1))
    [ $tries -lt 600 ] && kill -0 $daemon 2>/dev/null || store_fails
    sleep 0.05
done
if [ -n "$name" ] && { [ "$(cat $store/torpor-base 2>/dev/null)" != "$key" ] || ! docker image inspect "$name" > /dev/null 2>&1; }; then
    echo "torpor: making the local base"
    rm -f $store/torpor-base
    docker import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' /base.tar "$name" > /dev/null || store_fails
    docker image prune --force > /dev/null
    echo "$key" > $store/torpor-base
fi

phase CONTAINER
cd /out/context
failed=0
EXPERIMENTAL_BUILDKIT_SOURCE_POLICY=/out/login/policy.json \
    docker build --progress=plain --network=host --tag $made --file /out/dockerfile/Dockerfile . 2>&1 || failed=$?
if [ $failed != 0 ]; then trim; exit $failed; fi

phase DISK
docker image inspect --format '{{json .Config}}' $made > /out/config.json
layer=$(docker image inspect --format '{{.GraphDriver.Data.UpperDir}}' $made)
lower=/out/empty
mkdir /run/root /out/upper /out/work $lower
if [ -n "$layer" ]; then
    cd $store/overlay2
    lower=l/$(cat "${layer%/diff}/link")$(if [ -e "${layer%/diff}/lower" ]; then echo ":$(cat "${layer%/diff}/lower")"; fi)
fi
mount -t overlay -o "userxattr,lowerdir=$lower,upperdir=/out/upper,workdir=/out/work" overlay /run/root
cd /
du -sb -x /run/root | cut -f1 > /out/code_bytes
if [ -d /modules ]; then add_modules /run/root; fi
size=$(du -skx /run/root | cut -f1)
free=$(df -k --output=avail /out | tail -n 1)
if [ $((size + kept)) -gt "$free" ]; then
    echo "torpor: No space left on device: the image has $size KiB, the host $free KiB, of which $kept are kept (limits.disk_reserve_mib)"
    umount /run/root
    trim
    exit 1
fi
truncate -s "$bytes" /out/disk.raw
mkfs.ext4 -q -F -d /run/root -E lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0 /out/disk.raw
umount /run/root
trim
phase DONE
