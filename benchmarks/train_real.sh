#!/usr/bin/env bash
# A training run of the published size on real meshes, on one GPU, with its curves and its samples beside real meshes.
#   bash benchmarks/train_real.sh DATA OUT [--option value ...]
# DATA: what `python -m training.prepare_data` wrote. OUT: a folder for the run. Further options go to train.py.
# MINUTES (default 9) of training.
set -eu
cd "$(dirname "$0")/.."
data=${1:?usage: train_real.sh DATA OUT [--option value ...]}
out=${2:?usage: train_real.sh DATA OUT [--option value ...]}
shift 2
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

"$python" training/train.py training/configs/published.yaml --output_dir "$out" \
  --train_file "$data"/data/train-*.parquet --validation_file "$data"/data/validation-*.parquet \
  --max_steps 1000000 --max_minutes "${MINUTES:-9}" --lr_scheduler_type linear --warmup_steps 100 --learning_rate 0.003 \
  --logging_steps 20 --eval_steps 500 --save_steps 2000 --save_total_limit 1 \
  --num_samples 32 --sample_max_faces 400 --top_p 0.9 "$@"
"$python" -m training.drawing.curves "$out" --out "$out/curves.svg" --over minutes
"$python" - "$out/log.jsonl" <<'PY'
import json, sys

log = [json.loads(line) for line in open(sys.argv[1])]
steady = [line for line in log if "loss" in line][1:]  # the first line holds what is compiled
middle = sorted(steady, key=lambda line: line["tokens_per_second"])[len(steady) // 2]
last = steady[-1]
print(f"{last['step']} steps, {last['epoch']:.1f} epochs, {last['labels']:,} labels, {last['minutes']:.1f} minutes")
print(f"median {middle['tokens_per_second']:,.0f} tokens/s, {middle['useful_tokens_per_second']:,.0f} of them useful")
print(f"{last.get('memory_gib', 0):.1f} GiB; training loss {last['loss']:.4f}")
for line in log:
    if "eval_loss" in line:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items() if key != "eval_by_category"})
PY
"$python" -m training.drawing.contact_sheet "$out" --data "$data"/data/validation-*.parquet --out "$out/sheet.png"
