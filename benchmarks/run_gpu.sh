#!/usr/bin/env bash
# Tests and measures on one GPU: the GPU tests, generate(), training steps. Logs go to OUT; the tables end the output.
#   bash benchmarks/run_gpu.sh OUT [REFERENCE]
# OUT: a folder for the logs. REFERENCE: a folder of the original code, measured beside ours.
# STAGES (default "tests generate train"; also many, attention, flash) chooses; LIMIT (default 480) ends a stage after so many seconds.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: run_gpu.sh OUT [REFERENCE]}
reference=${2:+--reference $2}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

linear=$($python -c '
from importlib.util import find_spec
print(*[name for name in ("fla", "lightning_attn") if find_spec(name)], "triton", "chunked")
')
flash=$($python -c 'from transformers.utils import is_flash_attn_2_available as there; print(there() or "")')
workers=$($python -c 'from importlib.util import find_spec; print("-n 6" if find_spec("xdist") else "")')

stage() {
  local name=$1 start=$SECONDS status
  shift
  timeout --signal=INT --kill-after=20 "${LIMIT:-480}" "$@" >"$out/$name.txt" 2>&1
  status=$?
  summary+=("$name: exit status $status, $((SECONDS - start)) s")
  return $status
}

summary=()
failed=0
for each in ${STAGES:-tests generate train}; do
  case $each in
    # most of the time is compilation, so several processes share the GPU
    tests) stage tests env OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4 "$python" -m pytest -q -m gpu --durations=5 $workers \
      -p no:cacheprovider tests/test_gpu.py tests/test_gpu_engine.py tests/test_packed_attention.py tests/test_gpu_launch.py ;;
    # a single step is the recurrence, whatever the implementation: one is enough
    generate) stage generate "$python" benchmarks/bench_generate.py --preset published --batch_size 1 64 $reference ;;
    many) stage many "$python" benchmarks/bench_many.py --preset published --rows 512 --meshes 4000 ;;
    attention) stage attention "$python" benchmarks/bench_attention.py --linear $linear --full flash cudnn varlen &&
      stage attention_packed "$python" benchmarks/bench_attention.py --faces 205 --linear triton chunked --full varlen flex ;;
    train) stage train "$python" benchmarks/bench_train.py --preset published --step eager compiled \
      --linear_attn_implementation $linear $reference ;;
    flash) [ -z "$flash" ] || stage flash "$python" benchmarks/bench_train.py --preset published \
      --linear_attn_implementation ${linear%% *} --attn_implementation flash_attention_2 ;;
    *) echo "there is no stage $each" >&2; exit 2 ;;
  esac || failed=1
done

echo
for each in ${STAGES:-tests generate train}; do
  echo "== $each"
  case $each in
    tests)
      sed -n 's/^SKIPPED \[[0-9]*\] [^ ]* //p' "$out/tests.txt" | sort | uniq -c
      grep -E "^(FAILED|ERROR|E  )|passed|failed" "$out/tests.txt" | cut -c1-200 | tail -40 ;;
    *)
      for log in "$out/$each.txt" "$out/${each}_packed.txt"; do
        [ ! -e "$log" ] || grep -vE '^\{|[Ww]arning' "$log" | tail -25 | cut -c1-180
      done ;;
  esac
done
printf '%s\n' "" "${summary[@]}"
exit $failed
