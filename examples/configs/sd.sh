#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# DreamBooth with KronA on Stable Diffusion 2.1 (base).
#
#   examples/configs/sd.sh [released|paper] SUBJECT_FOLDER "a photo of sks dog" [more flags of dreambooth_kron.py]
#
# released: what DiffuseKronA's released script for SD uses: (64, 8), lr 1e-3, 500 steps, and its product's layout.
# paper:    what the paper finds best: (a1, a2) = (4, 64), that is a_out = 64 and a_in = 4 here, lr 5e-4, 1000 steps.
# Both: batch 1 x 4 accumulated, 8-bit AdamW, weight decay 1e-2, constant rate, no warm-up, fp16, no class images.
# The released scripts train at 1024 pixels; this model was made for 512, so add `--resolution 1024` to copy that too.
set -euo pipefail

preset=released
case "${1:-}" in
released | paper) preset=$1 && shift ;;
esac
if [ $# -lt 2 ]; then
  echo "usage: $0 [released|paper] SUBJECT_FOLDER INSTANCE_PROMPT [flags]" >&2
  exit 2
fi
folder=$1 prompt=$2
shift 2

released=(--krona_a_out 64 --krona_a_in 8 --learning_rate 1e-3 --max_train_steps 500 --layout diffusekrona)
paper=(--krona_a_out 64 --krona_a_in 4 --learning_rate 5e-4 --max_train_steps 1000 --layout kron)
settings=("${released[@]}")
if [ "$preset" = paper ]; then settings=("${paper[@]}"); fi

examples=$(cd "$(dirname "$0")/.." && pwd)
exec accelerate launch --num_processes "${NUM_PROCESSES:-1}" "$examples/dreambooth_kron.py" \
  --pretrained_model_name_or_path "${MODEL:-stabilityai/stable-diffusion-2-1-base}" \
  --instance_data_dir "$folder" --instance_prompt "$prompt" \
  --output_dir "${OUTPUT:-output/sd-$preset}" \
  --train_batch_size 1 --gradient_accumulation_steps 4 --gradient_checkpointing \
  --use_8bit_adam --adam_weight_decay 1e-2 --max_grad_norm 1.0 \
  --lr_scheduler constant --lr_warmup_steps 0 --mixed_precision fp16 --seed 0 \
  --checkpointing_steps 500 \
  "${settings[@]}" "$@"
