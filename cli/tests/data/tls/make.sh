#!/usr/bin/env bash
# Makes the certificates of cli/tests/hub/tls.rs anew: of an authority whose key nobody keeps, and of a server called localhost.
# server.key is for these tests alone, and no secret: nothing trusts the authority but they.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
touch "$work/index"
cat >"$work/config" <<END
[ca]
default_ca = tests
[tests]
database = $work/index
new_certs_dir = $work
rand_serial = yes
default_md = sha256
policy = any
default_startdate = 20200101000000Z
default_enddate = 21200101000000Z
[any]
commonName = supplied
[req]
distinguished_name = any
[authority]
basicConstraints = critical, CA:true
[server]
basicConstraints = critical, CA:false
subjectAltName = DNS:localhost
END
request() { openssl req -config "$work/config" -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$1" -keyout "$2" -out "$work/request"; }
sign() { openssl ca -config "$work/config" -batch -notext -in "$work/request" -keyfile "$work/authority.key" "$@"; }
request "layer-streamer's tests" "$work/authority.key"
sign -selfsign -extensions authority -out authority.pem
request localhost server.key
sign -cert authority.pem -extensions server -out server.pem
