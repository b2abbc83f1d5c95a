#!/usr/bin/env bash
# A steady load over kept connections: MICROVM [SECONDS] [CONNECTIONS] [PATH] [PORT]
tool=wrk
. "$(dirname "$0")/common.sh"
profile() {
	wrk -t2 -c"$connections" -d"${1}s" --latency --timeout 35s \
		-H "X-aws-proxy-auth: $token" -H "X-aws-proxy-port: $port" "$url"
}
slices profile
