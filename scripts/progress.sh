#!/usr/bin/env bash
# progress.sh TITLE LOG COMMAND...: runs a long command with its output in LOG, says
# every few seconds that it is alive, and shows the log's end if it fails. The size of
# the folder WATCH is said with it, because pip is silent while it unpacks.
set -euo pipefail

title=$1 log=$2
shift 2
mkdir -p "$(dirname "$log")"

"$@" >"$log" 2>&1 </dev/null &
job=$!
trap 'kill "$job" 2>/dev/null || true' EXIT
echo "$title (log: $log)"
ticks=0
while kill -0 "$job" 2>/dev/null; do
    sleep 1
    if ((++ticks % 10 == 0)); then
        size=$(du -sm "${WATCH:-/dev/null}" 2>/dev/null | cut -f 1) || true
        last=$(grep -v WARNING "$log" | tail -n 1) || true
        printf '  %4d s  %5s MB  %.90s\n' "$SECONDS" "$size" "$last"
    fi
done
if wait "$job"; then
    echo "  done after $SECONDS s"
else
    code=$?
    tail -n 25 "$log" >&2
    echo "$title failed with code $code; the whole log is in $log" >&2
    exit "$code"
fi
