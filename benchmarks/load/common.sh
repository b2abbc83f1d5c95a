# Sourced by the profiles: arguments, the endpoint, and tokens that are renewed before they expire.
#
#   benchmarks/load/TOOL.sh MICROVM [SECONDS] [CONNECTIONS] [PATH] [PORT]
#
# A tool cannot change a field while it runs, so a long run is cut into slices, each with a token of its own that lives
# longer than its slice. TOKEN_MINUTES (60) sets the life. Needs the exports of `torpor env`.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: $0 MICROVM [SECONDS] [CONNECTIONS] [PATH] [PORT]" >&2; exit 2; }
microvm=$1 seconds=${2:-30} connections=${3:-32} path=${4:-/} port=${5:-8080}
minutes=${TOKEN_MINUTES:-60}
command -v "$tool" >/dev/null || { echo "$tool is not installed" >&2; exit 2; }
url=https://$(aws lambda-microvms get-microvm --microvm-identifier "$microvm" --query endpoint --output text)$path

# slices COMMAND: calls COMMAND with the seconds of each slice; $token is fresh.
slices() {
	local left=$seconds slice
	while [ "$left" -gt 0 ]; do
		slice=$((minutes * 50 < left ? minutes * 50 : left)) # five sixths of a token's life
		token=$(torpor token "$microvm" --port "$port" --minutes "$minutes" --quiet)
		echo "== $tool: $slice s of $left s, $connections connections, $url"
		"$1" "$slice"
		left=$((left - slice))
	done
}
