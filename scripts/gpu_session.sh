#!/usr/bin/env bash
# All that this project measures on a GPU, in one call of at most ten minutes: the CUDA tests, the cost of a
# step and of an unroll (BERT-base's shape, bf16).
#   bash scripts/gpu_session.sh OUT [--device cuda|cpu] [--small] [--parts NAMES] [--pack PACK]
#     [--minutes MINUTES] [--processes N]
# With PACK (see scripts/two_level/pack.py) it also meta-trains the rule for MINUTES (4) from
# scripts/two_level/checkpoint.safetensors on, by N processes (6), and compares it on the core cells.
# --parts names the parts to run, of "tests step unroll train core" (all).
# OUT gets a log and a JSON file of each part, and device.txt. A part that fails or runs out of its time
# leaves its log, and the others run all the same; the exit code counts the parts that failed.
# Needs Python 3.11 or newer with torch, safetensors, transformers, higher, peft, pytest and hypothesis.
# `--device cpu --small` tries the whole script within minutes, without a GPU.
# Last line: "parts that failed: N".
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:?usage: bash scripts/gpu_session.sh OUT [--device cuda|cpu] [--small] [--pack PACK]}
shift
device=cuda small=() pack="" minutes=4 processes=6 failed=0
parts="tests step unroll train core"
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2; shift 2 ;;
    --small) small=(--tiny); shift ;;
    --pack) pack=$2; shift 2 ;;
    --minutes) minutes=$2; shift 2 ;;
    --processes) processes=$2; shift 2 ;;
    --parts) parts=$2; shift 2 ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
mkdir -p "$out"
{ "$python" --version; "$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"; } >"$out/device.txt" 2>&1

part() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 code=0
  shift 2
  [[ " $parts " == *" $name "* ]] || return 0
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1 || code=$?
  [ $code -eq 0 ] || failed=$((failed + 1))
  echo "$name: exit code $code; $(tail -n 1 "$out/$name.log")"
}

marker=gpu
[ "$device" = cuda ] || marker="not slow and not gpu"
part tests 150 "$python" -m pytest -q -p no:cacheprovider -m "$marker" tests/test_gpu.py tests/optim/test_two_level_cuda.py
part step 120 "$python" scripts/benchmark_step.py --device "$device" "${small[@]}" --json "$out/step.json"
part unroll 200 "$python" scripts/benchmark_unroll.py --device "$device" "${small[@]}" --json "$out/unroll.json"
if [ -n "$pack" ]; then
  two=scripts/two_level where=(--encoder "$pack/encoder" --cache "$pack" --device "$device" --processes "$processes")
  batches=10 cells=core
  [ ${#small[@]} -eq 0 ] || batches=2 cells=core-types-head-5x1-prototype
  export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  part train $((minutes * 60 + 60)) "$python" $two/train.py "${where[@]}" --output "$out/run" \
    --resume $two/checkpoint.safetensors --tasks "$batches" --minutes "$minutes" --meta-lr 5e-3 --horizon 1400
  for split in val test; do
    part core 200 "$python" $two/evaluate.py "$out/run/rule.safetensors" rnnopt/rules/weights/rule.safetensors \
      "${where[@]}" --output "$out/core.jsonl" --cells $cells --split $split --episodes 20 --steps 40
    mv "$out/core.log" "$out/core-$split.log" 2>/dev/null
  done
fi
echo "parts that failed: $failed"
exit "$failed"
