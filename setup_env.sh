# Makes .venv beside this file and installs what is missing into it: `bash setup_env.sh`. reproduce.sh and tests/run.sh
# source it and do it themselves: install_requirements FILE...; sets ROOT and PY. PYTHON chooses the interpreter (3.11
# or newer).
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PY="$ROOT/.venv/bin/python"

install_requirements() {
    local file
    for file in "$@"; do
        cmp -s "$ROOT/$file" "$ROOT/.venv/installed-$file" || install_file "$file"
    done
}

install_file() {
    local python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed; set PYTHON to one" >&2
        exit 2
    }
    echo "installing $1 into .venv (the first time takes about 90 seconds) ..." >&2
    [ -x "$PY" ] || "$python" -m venv "$ROOT/.venv"
    "$PY" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$1"
    cp "$ROOT/$1" "$ROOT/.venv/installed-$1"
}

[ "${BASH_SOURCE[0]}" != "$0" ] || install_requirements requirements.txt
