#!/usr/bin/env bash
# Set up and run on a machine that has only Python 3.11 or newer and git.
#   bash scripts/run.sh demo     meta-train and compare on the embedded default, 2 to 3 minutes
#   bash scripts/run.sh tests    lint, types and the default test suite, offline, below 5 minutes
#   bash scripts/run.sh docs     the documentation, built strictly into build/site, a minute
#   bash scripts/run.sh versions lowest    the tests with the lowest versions that setup.cfg allows
#   bash scripts/run.sh versions newest    and with the newest that there are; once a week each
# The times are those of two idle cores, without the installation. Makes .venv beside the sources on
# the first call, with what it needs from the package index, and keeps it. What follows `tests` goes
# to pytest, such as `tests/meta` or `-n 0`; by default it runs one process for each core.
set -euo pipefail
cd "$(dirname "$0")/.."

job=${1:-}
case $job in
  demo) extras=meta ;;
  tests) extras=meta,compare,fields,test,dev ;;
  docs) extras=docs ;;
  versions)
    case ${2:-} in
      lowest|newest) exec bash scripts/versions.sh "${@:2}" ;;
      *) echo "usage: bash scripts/run.sh versions lowest|newest [pytest's arguments]" >&2; exit 2 ;;
    esac ;;
  *) echo "usage: bash scripts/run.sh demo|tests|docs|versions" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed, and $python is older; name another with PYTHON=..." >&2
  exit 2
}
[ -x .venv/bin/pip ] || "$python" -m venv .venv
PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$extras]"

shift
case $job in
  demo) exec .venv/bin/rnnopt demo "$@" ;;
  docs) NO_MKDOCS_2_WARNING=1 exec .venv/bin/mkdocs build --strict "$@" ;;
  tests)
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    # the types are checked while the tests run, and told last
    types=$(mktemp)
    trap 'rm -f "$types"' EXIT
    .venv/bin/mypy >"$types" 2>&1 &
    code=0
    # files stay together, since their tests share what they train
    .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@" || code=$?
    wait $! || code=$?
    cat "$types"
    exit $code
    ;;
esac
