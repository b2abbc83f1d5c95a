#!/usr/bin/env bash
# The same with h2load (--h1: the endpoint speaks HTTP/1.1): MICROVM [SECONDS] [CONNECTIONS] [PATH] [PORT]
tool=h2load
. "$(dirname "$0")/common.sh"
profile() {
	h2load --h1 -t1 -c"$connections" -m1 -D"$1" -H "X-aws-proxy-auth: $token" -H "X-aws-proxy-port: $port" "$url"
}
slices profile
