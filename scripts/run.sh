#!/usr/bin/env bash
# Set up and run on a machine that has only Python 3.11 or newer and git.
#   bash scripts/run.sh demo     meta-train and compare on the embedded default, about 7 minutes
#   bash scripts/run.sh tests    lint, types and the default test suite, offline, 9 minutes or more
#   bash scripts/run.sh docs     the documentation, built strictly into build/site, a minute
# Makes .venv beside the sources on the first call and keeps it.
set -euo pipefail
cd "$(dirname "$0")/.."

job=${1:-}
case $job in
  demo) extras=meta ;;
  tests) extras=meta,compare,test,dev ;;
  docs) extras=docs ;;
  *) echo "usage: bash scripts/run.sh demo|tests|docs" >&2; exit 2 ;;
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
    .venv/bin/mypy
    exec .venv/bin/python -m pytest "$@"
    ;;
esac
