#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Make TLS credentials for `umemctl serve` and `umemctl migrate` in DIR, laid out as QEMU's
# tls-creds-x509: certificates of this host, valid for DAYS, for all NAMEs and addresses that peers
# reach it by.  The CA is made where DIR has none; keep its ca-key.pem off the hosts afterwards.
#
#     scripts/make-certificates.sh DIR DAYS NAME...
set -eu

if [ $# -lt 3 ]; then
	echo "usage: $0 DIR DAYS NAME..." >&2
	exit 2
fi
dir=$1 days=$2
shift 2
# Others may look in; the keys are not for them.
mkdir -p "$dir"
umask 077

if ! [ -e "$dir/ca-key.pem" ]; then
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days "$days" \
		-subj "/CN=umem CA" -keyout "$dir/ca-key.pem" -out "$dir/ca-cert.pem" \
		-addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign"
fi

names=
for name; do
	case $name in
	*:* | [0-9]*.[0-9]*.[0-9]*.[0-9]*) kind=IP ;;
	*) kind=DNS ;;
	esac
	names="${names:+$names,}$kind:$name"
done

for role in server client; do
	openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$1" \
		-keyout "$dir/$role-key.pem" -out "$dir/$role.csr"
	printf 'subjectAltName=%s\nextendedKeyUsage=%sAuth\n' "$names" "$role" >"$dir/$role.ext"
	openssl x509 -req -in "$dir/$role.csr" -days "$days" -extfile "$dir/$role.ext" \
		-CA "$dir/ca-cert.pem" -CAkey "$dir/ca-key.pem" -CAcreateserial \
		-out "$dir/$role-cert.pem"
	rm "$dir/$role.csr" "$dir/$role.ext"
done
