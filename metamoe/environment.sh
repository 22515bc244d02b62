# Sourced by run_all.sh, tests/run.sh and .ci/run (bash). Sets
#   ROOT    the repository root
#   PYTHON  a Python that has exactly the versions in requirements.txt
# The running python3 (or $PYTHON, where the caller sets it) is used as it is when it has them. Otherwise they
# are installed into $ROOT/.venv, once: a .venv finished for this requirements.txt is used again without any
# network, one left half-made is made anew.
#   METAMOE_VENV=always   use .venv even where the running Python would do
#   METAMOE_VENV=never    use the running Python as it is; what differs from requirements.txt is listed
# Whatever is wrong is said in one line, and the script ends with status 2.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_env_fail() { echo "error: $*" >&2; exit 2; }

# Print what "$1" has other versions of. Status 0: it has the required ones; 1: it has not; 2: it is older than
# Python 3.11; else it does not run.
_env_differs() {
    "$1" - "$ROOT/requirements.txt" <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(2)
from importlib.metadata import PackageNotFoundError, version
differs = []
for line in open(sys.argv[1], encoding="utf-8"):
    name, _, wanted = line.split("#")[0].strip().partition("==")
    if name:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if found.split("+")[0] != wanted:  # 2.13.0+cpu is 2.13.0
            differs.append(f"{name} {found} ({wanted})")
print(", ".join(differs))
sys.exit(bool(differs))
PY
}

_env_check() { _env_differs "$1" >/dev/null 2>&1; }

# Say so where there is a GPU that this torch cannot use.
_env_gpu() {
    nvidia-smi -L 2>/dev/null | grep -q GPU || return 0
    "$PYTHON" -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && return 0
    echo "note: nvidia-smi sees a GPU, and torch $("$PYTHON" -c 'import torch; print(torch.__version__)') cannot use it (a build for the CPU, or a driver too old for its CUDA): install the same version from https://download.pytorch.org/whl/cuXXX that fits the driver, then run this again" >&2
}

_env_sha() { "$1" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$ROOT/requirements.txt"; }

# The finished .venv for this requirements.txt is there and runs.
_env_ready() {
    [ -x "$ROOT/.venv/bin/python" ] && [ "$(cat "$ROOT/.venv/metamoe.done" 2>/dev/null)" = "$1" ] \
        && "$ROOT/.venv/bin/python" -c pass 2>/dev/null
}

# _env_build BASE SHA: make .venv with BASE. metamoe.made marks it as ours before anything else is in it,
# metamoe.done is written last.
_env_build() {
    local venv=$ROOT/.venv log why
    _env_ready "$2" && return 0  # another run has just finished it
    if [ -e "$venv" ] && [ ! -e "$venv/metamoe.made" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
        _env_fail ".venv here was not made by this script and lacks the versions of requirements.txt: install them into it (pip install -r requirements.txt) and activate it, or remove it"
    fi
    rm -rf "$venv" && mkdir "$venv" && : > "$venv/metamoe.made" || _env_fail "cannot write $venv"
    echo "installing the versions of requirements.txt into .venv (once; some minutes, several GB with CUDA)" >&2
    log=$venv/install.log
    "$1" -m venv "$venv" >"$log" 2>&1 \
        || _env_fail "'$1 -m venv' failed (on Debian and Ubuntu it needs the package python3-venv): $(tail -n 1 "$log")"
    if ! PIP_USER=0 "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
            -r "$ROOT/requirements.txt" >"$log" 2>&1; then
        why=$(grep -E 'ERROR|Errno' "$log" | tail -n 1) || why=$(tail -n 1 "$log")
        _env_fail "installing requirements.txt failed: ${why:-no reason given} (all of it: .venv/install.log); run this again once it is mended"
    fi
    _env_check "$venv/bin/python" || _env_fail "pip reported success, but .venv lacks the versions of requirements.txt (see .venv/install.log)"
    printf '%s\n' "$2" > "$venv/metamoe.part" && mv "$venv/metamoe.part" "$venv/metamoe.done" || _env_fail "cannot write $venv"
}

_env_choose() {
    local base sha status=0
    base=$(command -v "${PYTHON:-python3}") || _env_fail "there is no '${PYTHON:-python3}' to run: Python 3.11 or newer is needed"
    case $base in /*) ;; *) base=$PWD/$base ;; esac
    _env_check "$base" || status=$?
    case $status in
        0) if [ "${METAMOE_VENV:-}" != always ]; then PYTHON=$base; return; fi ;;
        1) if [ "${METAMOE_VENV:-}" = never ]; then PYTHON=$base; echo "METAMOE_VENV=never: other versions than in requirements.txt: $(_env_differs "$base")" >&2; return; fi ;;
        2) _env_fail "$base is $("$base" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])'): Python 3.11 or newer is needed (set PYTHON to one)" ;;
        *) _env_fail "$base does not run (status $status)" ;;
    esac
    PYTHON=$ROOT/.venv/bin/python
    sha=$(_env_sha "$base")
    _env_ready "$sha" && return
    if [ "${METAMOE_VENV:-}" != always ] && [ -x "$PYTHON" ] && [ ! -e "$ROOT/.venv/metamoe.made" ] && _env_check "$PYTHON"; then
        return  # a .venv of the user's own that has everything
    fi
    if command -v flock >/dev/null; then
        ( flock 8; _env_build "$base" "$sha" ) 8>"$ROOT/.venv.lock" || exit 2
    else
        ( _env_build "$base" "$sha" ) || exit 2
    fi
}

_env_choose
_env_gpu
export ROOT PYTHON
