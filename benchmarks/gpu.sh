#!/usr/bin/env bash
# Measures on one NVIDIA GPU, within 8 minutes: one JSON file for each part, then the tables (also in cuda.md).
#
#   bash benchmarks/gpu.sh [folder]     PYTHON=... the interpreter; LIMIT=... seconds in all (470)
#
# Parts run in order of importance. One that takes longer than its budget is stopped; its file keeps the cases that were
# through. The exit status is 0 if every part came to its end. Whether the kernels are right is another command:
#
#   python -m pytest -n 8 -m gpu tests/test_triton.py
#
# Estimates for an H100 with 16 cores and empty caches (never run there), each with 15 s for the imports:
#   layer          95 s: 16 cases, of each 2 s of timing and up to 3 s in which kernels are compiled
#   unet          190 s: 6 providers, 2 turns each: 4 s to inject, 5 steps of 4 variants (0.25, 0.35, 0.5 and 0.65 s)
#   unet-compiled 100 s: 6 providers, 4 s each to inject and 10 s to compile two shapes of block, forward and backward
#   qkv            25 s
#   variants       20 s
#   scaling        45 s
#   host           25 s
#   inference      60 s, if that much is left
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python}
limit=${LIMIT:-470}
unfinished=()

export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # at batch 4 without checkpointing little memory is to spare
export TQDM_MININTERVAL=5                               # seconds between two lines of progress

part() { # part <budget in seconds> <name of the file> <arguments of benchmarks.run>
    local budget=$1 name=$2 left=$((limit - SECONDS)) status
    shift 2
    ((budget <= left)) || budget=$left
    if ((budget < 1)); then
        echo "== $name: no time left"
        unfinished+=("$name")
        return
    fi
    echo "== $name: at second $SECONDS, for at most $budget s"
    timeout -k 5 "$budget" "$python" -m benchmarks.run --device cuda --dtype bfloat16 --out "$out/$name.json" "$@"
    status=$?
    if ((status != 0)); then
        echo "== $name: ended with status $status (124: stopped when its time was up)"
        unfinished+=("$name")
    fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv || true
echo "Test the kernels: $python -m pytest -n 8 -m gpu tests/test_triton.py"
mkdir -p "$out"
rm -f "$out"/*-cuda.json # measure everything anew

lora="PEFT LoRA r=4"
krona=("KronA (64,4)" "KronA (64,4), triton" "KronA (64,8)" "KronA (64,8), triton")
part 110 layer-cuda --suite layer --repetitions 25 \
    --providers "$lora" "LyCORIS LoKr, bypass" KronA "KronA, triton"
part 220 unet-cuda --suite unet --only SDXL --repetitions 2 --steps 3 --batch 1 4 --gradient-checkpointing off on \
    --providers "$lora" "${krona[@]}"
part 120 unet-compiled-cuda --suite unet --only SDXL --repetitions 1 --steps 10 --compile \
    --providers "$lora" "${krona[@]}"
part 40 qkv-cuda --suite qkv --repetitions 25
part 30 variants-cuda --suite variants
part 60 scaling-cuda --suite scaling --repetitions 15
part 40 host-cuda --suite host
part 90 inference-cuda --suite inference --only SDXL --repetitions 1 --steps 5 \
    --providers "$lora" "${krona[@]}" "KronA (64,4), merged"

"$python" -m benchmarks.report "$out"/*-cuda.json | tee "$out/cuda.md"
echo
echo "The numbers lie in $(cd "$out" && pwd):"
for file in "$out"/*-cuda.json; do [[ -e $file ]] && echo "  ${file##*/}"; done
echo "  cuda.md: the tables above"
echo "Nothing has been measured on this kind of GPU yet? Then please send them: as a pull request with these files in"
echo "benchmarks/results/, or attached to an issue. They hold the GPU's name, versions and times, nothing else of yours."
if ((${#unfinished[@]})); then
    echo "Not finished: ${unfinished[*]}. What they measured before is in their files; send it too."
    exit 1
fi
echo "All parts finished after $SECONDS s."
