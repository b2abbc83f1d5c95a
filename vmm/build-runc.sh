#!/bin/sh
# What BuildKit runs in runc's place: it adds what the host lends to the step's bundle (config.json, OCI runtime-spec), then is runc. Go
# writes that file without a space, and no string in it can hold an unescaped quote, so the first `"env":[` is the process's.
# What comes first in the environment is overridden by the image's own. BuildKit gives rootless steps no /sys, which Docker's have.
set -eu
bundle='' last=''
for word in "$@"; do
    [ "$last" != --bundle ] || bundle=$word
    last=$word
done
if [ -n "$bundle" ]; then
    read -r environment < /lent/environment || :
    lent='{"destination":"/dev/.lent","type":"bind","source":"/lent","options":["rbind","ro","nosuid","nodev"]}'
    lent="$lent,"'{"destination":"/sys","type":"bind","source":"/step-sys","options":["rbind","ro","nosuid","nodev","noexec"]}'
    # The local base's own sources name Debian's mirrors; the host may reach others only.
    own=/etc/apt/sources.list.d/torpor.sources
    if [ -f "$bundle/rootfs$own" ] && [ -s /lent/apt/host.sources ]; then
        lent="$lent,{\"destination\":\"$own\",\"type\":\"bind\",\"source\":\"/lent/apt/host.sources\",\"options\":[\"bind\",\"ro\",\"nosuid\",\"nodev\",\"noexec\"]}"
    fi
    sed -i -e "s|\"env\":\[|&$environment|" -e "s|{\"destination\":\"/dev\",[^{}]*}|&,$lent|" "$bundle/config.json"
fi
exec /usr/sbin/runc "$@"
