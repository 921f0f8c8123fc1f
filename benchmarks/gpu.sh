#!/usr/bin/env bash
# Every suite on one GPU (planned for at most 8 minutes on an H100), each as JSON beside the others; then the tables.
#   benchmarks/gpu.sh [folder]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python}
export PEFT_KRONA_CACHE=$out/tuning # where backend "auto" keeps what it measures
unset CI                            # where it would not measure
rm -f "$PEFT_KRONA_CACHE"/*.json    # measure it anew
suite() { "$python" -m benchmarks.run --device cuda --dtype bfloat16 --suite "$1" --out "$out/$1-cuda.json" "${@:2}"; }
suite layer --repetitions 25
suite scaling --repetitions 25
suite unet --repetitions 2 --steps 8
suite inference --repetitions 2 --steps 8
"$python" -m benchmarks.report "$out"/{layer,scaling,unet,inference}-cuda.json | tee "$out/cuda.md"
cat "$PEFT_KRONA_CACHE"/*.json
