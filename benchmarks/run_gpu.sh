#!/usr/bin/env bash
# Tests and measures on one GPU: the GPU tests, generate(), training steps. Logs go to OUT, and the tables are repeated at the end.
#   bash benchmarks/run_gpu.sh OUT [REFERENCE]
# OUT: a folder for the logs. REFERENCE: a folder of the original code, measured beside ours.
# STAGES (default "tests generate train") chooses; LIMIT (default 240) ends a stage after so many seconds.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: run_gpu.sh OUT [REFERENCE]}
reference=${2:+--reference "$2"}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

linear=$($python - <<'PY'
from importlib.util import find_spec
packages = {"fla": "fla", "lightning_attn": "lightning_attn"}
print(*[name for name, package in packages.items() if find_spec(package)], "chunked")
PY
)
attention=$($python - <<'PY'
from transformers.utils import is_flash_attn_2_available
print("sdpa", *["flash_attention_2"] * is_flash_attn_2_available())
PY
)

stage() {
  local name=$1 start=$SECONDS status
  shift
  timeout --signal=INT --kill-after=20 "${LIMIT:-240}" "$@" >"$out/$name.txt" 2>&1
  status=$?
  echo "$name: exit status $status, $((SECONDS - start)) s"
  summary+=("$name: exit status $status, $((SECONDS - start)) s")
  return $status
}

summary=()
failed=0
for each in ${STAGES:-tests generate train}; do
  case $each in
    tests) stage tests "$python" -m pytest -q -m gpu --durations=5 -p no:cacheprovider tests/test_gpu.py ;;
    # a single step is the recurrence whatever the implementation: one of them is enough
    generate) stage generate "$python" benchmarks/bench_generate.py --preset published --batch_size 1 64 $reference ;;
    train) stage train "$python" benchmarks/bench_train.py --preset published --compile \
      --linear_attn_implementation $linear --attn_implementation $attention $reference ;;
    *) echo "there is no stage $each" >&2; exit 2 ;;
  esac || failed=1
done

echo
for each in ${STAGES:-tests generate train}; do
  echo "== $each"
  case $each in
    tests) grep -E "^(FAILED|ERROR)|SKIPPED|passed|failed|error" "$out/tests.txt" | cut -c1-200 | tail -25 ;;
    *) grep -vE '^\{|[Ww]arning' "$out/$each.txt" | tail -30 | cut -c1-200 ;;
  esac
done
printf '%s\n' "" "${summary[@]}"
exit $failed
