# Makes .venv beside this file and installs into it what is missing: `bash setup_env.sh`. reproduce.sh and tests/run.sh
# source it and do it themselves: install_requirements NAME...; sets ROOT and PY. PYTHON chooses the interpreter (3.11
# or newer).
#
# What is installed is in the lock files: every package of the tree, its version, and a hash of each of its files.
# `bash setup_env.sh --lock` writes them anew after a change of requirements.txt or requirements-dev.txt. It needs uv
# (0.13.9) and keeps versions that still fit; `--lock --upgrade` takes newer ones.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PY="$ROOT/.venv/bin/python"
# Taken where pip finds it: the CPU build for Python 3.11 on x86-64 Linux. Else it is PyPI's, there with CUDA.
TORCH_CPU="torch==2.13.0+cpu --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"

install_requirements() {
    local name
    for name in "$@"; do
        cmp -s "$ROOT/$name.lock" "$ROOT/.venv/installed-$name.lock" || install_lock "$name" || {
            echo "not installed: $name.lock; run the same command again" >&2
            return 1
        }
    done
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed; set PYTHON to one" >&2
        exit 2
    }
}

install_lock() {
    local python="${PYTHON:-python3}" installing="$ROOT/.venv/installing" failed=0
    new_enough "$python"
    echo "installing $1.lock into .venv (the first time takes about 90 seconds) ..." >&2
    # Begun anew where pip was killed, which may have left half of a package, or the making of the venv itself.
    { [ ! -e "$installing" ] && "$PY" -m pip --version > /dev/null 2>&1; } ||
        "$python" -m venv --clear "$ROOT/.venv" || return
    touch "$installing"
    [ "$1" != requirements ] || pip_hashed <(echo "$TORCH_CPU") 2> /dev/null || true
    pip_hashed "$ROOT/$1.lock" || failed=$?
    [ "$failed" != 0 ] || "$PY" -m pip check > /dev/null || pip_hashed "$ROOT/requirements-cuda.lock" || failed=$?
    rm "$installing"
    [ "$failed" = 0 ] && "$PY" -m pip check && cp "$ROOT/$1.lock" "$ROOT/.venv/installed-$1.lock"
}

# pip_hashed FILE: what FILE names and nothing else, each file of the hash that is named
pip_hashed() {
    "$PY" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r "$1"
}

lock() {
    local compile=(uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate)
    cd "$ROOT"
    local all
    all="$(mktemp)"
    cat requirements.lock requirements-cuda.lock > "$all" # the versions that are kept
    "${compile[@]}" "$@" requirements.txt -o "$all"
    awk '/^[^ ]/ {cuda = /^(cuda|nvidia|triton)/} {print > (cuda ? "requirements-cuda.lock" : "requirements.lock")}' "$all"
    "${compile[@]}" "$@" -c "$all" requirements-dev.txt -o requirements-dev.lock
    rm "$all"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    case "${1:-}" in
        --lock) shift && lock "$@" ;;
        "") install_requirements requirements ;;
        *) echo "bash setup_env.sh, or with --lock" >&2 && exit 2 ;;
    esac
fi
