#!/usr/bin/env bash
# The same with hey: MICROVM [SECONDS] [CONNECTIONS] [PATH] [PORT]. Trusts the system's authorities and SSL_CERT_FILE.
tool=hey
. "$(dirname "$0")/common.sh"
export SSL_CERT_FILE=${SSL_CERT_FILE:-${CURL_CA_BUNDLE:-/etc/ssl/certs/ca-certificates.crt}}
profile() {
	hey -z "${1}s" -c "$connections" -t 35 -H "X-aws-proxy-auth: $token" -H "X-aws-proxy-port: $port" "$url"
}
slices profile
