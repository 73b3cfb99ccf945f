#!/bin/sh
# Sets one of the demo's hospitals up: its table, its keys, its application; then its invitation, once that has come.
# What comes by mail lies in $MAIL; what people would say by telephone lies in $MAIL/*.fingerprint.
set -eu
umask 077
SITE=$1
MAIL=/var/spool/wardround
FOLDER=/var/lib/wardround/site

if [ -e "$FOLDER/state/consortium.json" ]; then exit 0; fi
if [ -e "$FOLDER" ]; then
  echo "an earlier set-up stopped half-way: docker compose -f docker/compose.yaml down --volumes" >&2
  exit 2
fi

wait_for() {
  tries=0
  until [ -e "$1" ]; do
    tries=$((tries + 1))
    if [ "$tries" -gt 600 ]; then echo "$1 did not come in ten minutes" >&2; exit 1; fi
    sleep 1
  done
}

wait_for "$MAIL/dictionary.toml"
mkdir "$FOLDER"
cp "$MAIL/dictionary.toml" "$FOLDER/dictionary.toml"
python /demo/tables.py deploy-demo "$SITE" "$FOLDER/table.parquet"
wardround client init "$FOLDER" --name "$SITE" --table "$FOLDER/table.parquet" \
  --dictionary "$FOLDER/dictionary.toml" --epsilon 8 --delta 1e-5 | tee /tmp/said
grep -oE '([A-Z2-7]{4} ){7}[A-Z2-7]{4}' /tmp/said > "$MAIL/$SITE.fingerprint"
cp "$FOLDER/$SITE.application.json" "$MAIL/$SITE.application.json"
touch "$MAIL/$SITE.sent"

wait_for "$MAIL/invited"
set --
for file in "$MAIL"/site-*.fingerprint; do
  set -- "$@" --verified "$(cat "$file")"
done
wardround client join "$MAIL/$SITE.invitation.json" --site "$FOLDER/site.toml" \
  --coordinator "$(cat "$MAIL/coordinator.fingerprint")" "$@"
