#!/usr/bin/env bash
# Every test:        bash tests/run.sh
# The quick ones:    bash tests/run.sh -m "not slow"
# Arguments go to pytest. Where the running Python lacks the pinned packages, .venv gets them first (metamoe/environment.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../metamoe/environment.sh"
cd "$ROOT"
exec "$PYTHON" -m pytest tests -q "$@"
