#!/bin/sh
# Founds the demo's coordinator, waits for four applications, enrols and invites. What comes by mail lies in $MAIL; what
# people would say by telephone lies in $MAIL/*.fingerprint, which nobody may do in earnest.
set -eu
umask 077
MAIL=/var/spool/wardround
HOME_OF=/var/lib/wardround
WARDROUND_COORDINATOR=$HOME_OF/coordinator
export WARDROUND_COORDINATOR

if [ -e "$MAIL/invited" ]; then exit 0; fi
if [ -e "$WARDROUND_COORDINATOR" ]; then
  echo "an earlier set-up stopped half-way: docker compose -f docker/compose.yaml down --volumes" >&2
  exit 2
fi

python /demo/tables.py deploy-demo dictionary "$MAIL/dictionary.toml.part"
mv "$MAIL/dictionary.toml.part" "$MAIL/dictionary.toml"
python -c 'import secrets; print(secrets.token_hex(16))' > "$HOME_OF/coordinator.passphrase"
wardround server init "$WARDROUND_COORDINATOR" --consortium "deploy-demo in containers" --address coordinator:9092 \
  --passphrase-file "$HOME_OF/coordinator.passphrase" | tee /tmp/said
grep -oE '([A-Z2-7]{4} ){7}[A-Z2-7]{4}' /tmp/said > "$MAIL/coordinator.fingerprint"

for site in "$@"; do
  tries=0
  until [ -e "$MAIL/$site.sent" ]; do
    tries=$((tries + 1))
    if [ "$tries" -gt 600 ]; then echo "no application of $site came in ten minutes" >&2; exit 1; fi
    sleep 1
  done
done
wardround server enroll "$MAIL"/*.application.json
wardround server invite --out "$MAIL"
touch "$MAIL/invited"
