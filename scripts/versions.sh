#!/usr/bin/env bash
# The default tests with the lowest versions that setup.cfg allows, or with the newest that there are.
#   bash scripts/versions.sh lowest|newest [pytest's arguments]
# Makes build/venv-lowest or build/venv-newest anew, and prints which versions it has tested. What the
# tests say of a library's warnings may differ between versions: warnings are no errors here.
set -euo pipefail
cd "$(dirname "$0")/.."

which=${1:?lowest or newest}
shift
python=${PYTHON:-python3}
folder=build/venv-$which
rm -rf "$folder"
"$python" -m venv "$folder"
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
if [ "$which" = lowest ]; then
  "$python" scripts/bounds.py >"$constraints"
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/bin/python" -m pip install --quiet --upgrade --upgrade-strategy eager \
  --constraint "$constraints" --editable ".[meta,compare,test]"
"$folder/bin/python" -m pip list --format freeze | grep -iE \
  '^(numpy|safetensors|torch|transformers|peft|scikit-learn|scipy|accelerate)==' || true
"$folder/bin/python" -m pytest -n auto --dist loadfile -W default "$@"
