#!/usr/bin/env bash
# Every test:        bash tests/run.sh
# The quick ones:    bash tests/run.sh -m "not slow"
# Arguments go to pytest. Where the running Python lacks the pinned packages, .venv gets them first (metamoe/environment.sh).
# Without arguments two processes share the files, one thread each: most tests compute with one thread.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../metamoe/environment.sh"
cd "$ROOT"
[ $# -eq 0 ] || exec "$PYTHON" -m pytest -q "$@"

half() {  # half N: every second file, from the first or the second on
    local files=() number=0 file
    for file in tests/test_*.py; do
        [ $((number % 2)) -eq "$1" ] && files+=("$file")
        number=$((number + 1))
    done
    METAMOE_TEST_THREADS=1 OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q "${files[@]}"
}

said=$(mktemp)
half 1 >"$said" 2>&1 &
other=$!
trap 'kill "$other" 2>/dev/null || true; rm -f "$said"' EXIT
status=0
half 0 || status=$?
wait "$other" || status=$?
cat "$said"
exit "$status"
