#!/usr/bin/env bash
# Runs the tests: `bash tests/run.sh` all of them, `bash tests/run.sh --fast` without the slow tier (under 90 seconds).
# Further arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../setup_env.sh"
install_requirements requirements requirements-dev
cd "$ROOT"
select=()
if [ "${1:-}" = "--fast" ]; then
    select=(-m "not slow")
    shift
fi
# Tiny models gain nothing from a second thread; two workers do, a file of tests each.
export OMP_NUM_THREADS=1
# Where a shell forbids it, modules are compiled in each worker and each run: half of the time until the first test.
unset PYTHONDONTWRITEBYTECODE
exec "$PY" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${select[@]}" "$@"
