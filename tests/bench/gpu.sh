#!/usr/bin/env bash
# What has only ever run on a CPU, checked and measured on one CUDA GPU (80 GB) in at most 9 minutes:
#     bash tests/bench/gpu.sh
# The most important part comes first; a part that the time is up for is left out, and said to be.
# TOY=1: all of it at toy sizes on the CPU, which tests this script alone. Exit code 1 where a part fails.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python}
LIMIT=${LIMIT:-530}  # seconds
failed=0

part() {  # part SECONDS TITLE COMMAND...: at most so many seconds
  local most=$1 title=$2 left=$((LIMIT - SECONDS))
  shift 2
  printf '\n## %s\n\n' "$title"
  if ((left < 20)); then
    echo "left out: the time is up"
    return
  fi
  timeout $((most < left ? most : left)) "$PYTHON" "$@"
  local code=$?
  if ((code == 124)); then
    echo "cut off after $((most < left ? most : left)) s"
  elif ((code)); then
    echo "FAILED (exit code $code)"
    failed=1
  fi
}

if [ "${TOY:-}" = 1 ]; then
  part 120 'Tests on the device' -m pytest -q tests/test_dpp.py -k torch_in_torch_out
  part 300 'Checks, dispatch, memory, embedding' tests/bench/bench_gpu.py --toy --device cpu
  part 120 'Whole models' tests/bench/bench_models.py --models tiny --device cpu --batches 1 2 --least 0.01
  exit $failed
fi
part 60 'Tests on the device' -m pytest -q tests/test_dpp.py -k torch_in_torch_out
part 200 'Checks, dispatch, memory, embedding' tests/bench/bench_gpu.py
part 120 'Whole models, eager' tests/bench/bench_models.py --least 1
part 150 'ViT-B/32, compiled' tests/bench/bench_models.py --least 1 --compile --models vit
part 200 'LLaMA of 1 billion, compiled' tests/bench/bench_models.py --least 1 --compile --models llama
exit $failed
