# Runs inside the build's jail as root of its user namespace. $1 the local base's names (space separated), $2 the image's
# tag, $3 the disk's bytes, $4 "pull" or "never", $5 the descriptor that takes the phases' names, one a line, $6 what the base
# archive was made from.
set -eu
umask 022
names=$1 tag=$2 bytes=$3 pull=$4
phase() { echo "$1" >&"$phases"; }
phases=$5 key=$6
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
b() { buildah --root /store --runroot /runroot --storage-driver overlay "$@"; }

# Here root owns what root is to own, links lead nowhere but below this root, and every mode may be as the archive has it.
mkdir /out/ctx
tar -C /out/ctx --warning=no-timestamp -xpf /ctx.tar

phase BASE
for name in $names; do
    [ -n "$(b images -q "$name" 2>/dev/null || :)" ] && [ "$(cat /store/local-base 2>/dev/null)" = "$key" ] && continue
    echo "torpor: making the local base for $name"
    container=$(b from scratch)
    b add -q "$container" /base.tar / >/dev/null
    b config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin $(cat /buildhost/environment) "$container"
    b commit -q --rm "$container" "$name" >/dev/null
done
echo "$key" > /store/local-base
# What an earlier build pulled gives this one no right to it: the names go, layers stay where cached ones stand on them. What
# builds that were killed left in the store goes with them.
b rm --all >/dev/null 2>&1 || :
listed=$(b images --noheading --format '{{.ID}} {{.Name}} {{.Tag}}')
echo "$listed" | while read -r id name tag; do
    case "$name" in ""|localhost/*) continue;; esac
    case " $names " in *" $name:$tag "*) continue;; esac
    [ "$tag" = "<none>" ] || id=$name:$tag
    b rmi --force "$id" >/dev/null || exit 75
done
for name in $names; do
    if grep -qiE "^[[:space:]]*FROM[^#]*$name" /out/ctx/Dockerfile; then
        echo "torpor: $name is the local base (Debian, with a dnf that calls apt): no container registry is asked for it"
    fi
done

phase CONTAINER
policy=never
[ "$pull" = pull ] && policy=false # only what is missing: the local base is there, nothing else is
b bud --pull=$policy --authfile /auth.json --layers --isolation chroot --network host --volume /buildhost:/run/buildhost:ro,rbind --tag "$tag" /out/ctx 2>&1

phase DISK
b inspect --type image "$tag" > /out/config.json
container=$(b from --pull-never "$tag")
root=$(b mount "$container")
[ -n "$root" ] && [ "$root" != / ] || exit 70
rmdir "$root/run/buildhost" 2>/dev/null || :
du -sb -x "$root" | cut -f1 > /out/code_bytes
if [ -d /modules ]; then add_modules "$root"; fi
truncate -s "$bytes" /out/disk.raw
mkfs.ext4 -q -F -d "$root" -E lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0 /out/disk.raw
b umount "$container" >/dev/null
b rm "$container" >/dev/null
phase DONE
