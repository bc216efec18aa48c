#!/usr/bin/env bash
# All that a GPU can tell about this code, in one call of less than ten minutes: are the kernels right, how fast are
# they and whole models, and does training run. Needs torch and triton; peers, matplotlib and DeepSpeed are used where
# they are. On a machine without a GPU, or with --dry-run, everything runs on the CPU at toy sizes.
#
#   eval/gpu_suite.sh [--dry-run]      PYTHON=python3  OUT=eval/results/gpu
#
# A stage that fails or runs out of its time stops no other, but the exit status is 1. $OUT holds eight files at most:
# summary.txt, logs.tar.gz (a log for each stage), and JSON and picture of kernels, throughput and generation.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-eval/results/gpu}
TOTAL=570 # seconds
mkdir -p "$OUT" || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
logs=$work/logs summary=$OUT/summary.txt status=0
mkdir "$logs"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

dry=""
if [ "${1:-}" = --dry-run ] || ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    dry=yes
    export CUDA_VISIBLE_DEVICES=""
fi

say() { echo "$*" | tee -a "$summary"; }

# stage NAME SECONDS COMMAND...: run it within that time and within what is left of the whole.
stage() {
    local name=$1 seconds=$2 begin=$SECONDS code left=$((TOTAL - SECONDS))
    shift 2
    if [ "$left" -lt 10 ]; then
        say "LEFT OUT  $name: no time left"
        status=1
        return
    fi
    echo "=== $name"
    timeout -k 5 "$((seconds < left ? seconds : left))" "$@" 2>&1 | tee "$logs/$name.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) say "ok        $name, $((SECONDS - begin)) s" ;;
        124 | 137) say "FAILED    $name: out of time after $((SECONDS - begin)) s" ;;
        *) say "FAILED    $name: exit code $code after $((SECONDS - begin)) s" ;;
    esac
    [ "$code" = 0 ] || status=1
    tar -czf "$OUT/logs.tar.gz" -C "$logs" .
}

: >"$summary"
say "$(date -u +%FT%TZ) $(git describe --always --dirty 2>/dev/null), $("$PYTHON" -c 'import torch
print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "without a GPU")')"

models=(xlstm-400m transformer-400m mamba2-400m xlstm-1.3b)
checks=("xlstm_lm doctor "{float32,bfloat16,float16})
checks+=("eval.bench.verify_models "{xlstm-400m,xlstm-1.3b,mamba2-400m,xlstm-paper-{125m,350m,760m}-7-1})
kernels=(--budget 150) # the lengths that matter most come first
throughput=(--lengths 8192 2048 16384 --tokens 16384 --seconds 4 --budget 60)
generation=(--lengths 512 4096 16384 --batch-sizes 1 16 --new-tokens 32 --rounds 3 --seconds 4 --budget 35)
training=(
    --model.embedding_dim 512 --model.num_blocks 8 --data.context_length 2048 --training.steps 60
    --schedule.warmup 10 --schedule.cooldown 30 --data.validation_tokens 65536
)
if [ -n "$dry" ]; then
    tiny=embedding_dim=64,num_blocks=2,num_heads=2,vocab_size=256
    models=("xlstm-tiny=xlstm:$tiny" "transformer-tiny=transformer:$tiny")
    checks=("xlstm_lm doctor float32" "eval.bench.verify_models xlstm-cpu-0.7m")
    kernels=(--lengths 64 128 --rounds 1)
    throughput=(--lengths 64 128 --tokens 128 --rounds 3 --seconds 1)
    generation=(--lengths 16 32 --batch-sizes 1 2 --new-tokens 4 --rounds 3 --seconds 1)
    training=(
        --data.context_length 64 --training.steps 4 --schedule.warmup 1 --schedule.cooldown 1
        --data.validation_tokens 1024
    )
fi

# A process for each type and each model, because most of the time goes into compiling.
stage correctness 130 bash -c 'logs=$1 python=$2 status=0
    shift 2
    for check in "$@"; do
        timeout 120 "$python" -m $check >"$logs/correctness-${check##* }.log" 2>&1 &
        processes+=($!)
    done
    for process in "${processes[@]}"; do wait "$process" || status=1; done
    for check in "$@"; do cat "$logs/correctness-${check##* }.log"; done
    exit $status' _ "$logs" "$PYTHON" "${checks[@]}"
stage kernels 190 "$PYTHON" -m eval.kernels "${kernels[@]}" --out "$OUT/kernels.json"
stage throughput 100 "$PYTHON" -m eval.throughput --models "${models[@]}" "${throughput[@]}" --out "$OUT/throughput.json"
stage generation 65 "$PYTHON" -m eval.throughput --generate --models "${models[@]:0:3}" "${generation[@]}" \
    --out "$OUT/generation.json"

missing=$("$PYTHON" -c 'import importlib.util as u
needed = ("deepspeed", "pydantic", "yaml", "datasets", "transformers", "tokenizers", "wandb", "safetensors")
print(*(name for name in needed if u.find_spec(name) is None))')
if [ -n "$missing" ]; then
    say "left out  training: not installed here: $missing"
else
    stage training 80 "$PYTHON" -m xlstm_lm train --config configs/train/demo.yaml --training.run_dir "$work/run" \
        --training.log_every 1 --training.checkpoint_every 1000 "${training[@]}"
fi
say "Took $SECONDS s. Results are in $OUT."
exit $status
