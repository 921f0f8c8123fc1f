# SPDX-License-Identifier: Apache-2.0
"""The command line and what follows from it. Flags that diffusers' DreamBooth LoRA scripts have keep their names.

Only this file and the script itself see the parsed flags; every other helper is given the values that it uses.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoKrConfig, LoraConfig, PeftConfig

from peft_krona import KronAConfig
from peft_krona.errors import KronAError
from peft_krona.targets import ATTENTION

from . import TrainingError
from .config_file import read_config
from .families.base import Family

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "piecewise_constant",
)
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
# diffusers' default is 1e-4 for LoRA; 5e-4 is the DiffuseKronA paper's optimum
LEARNING_RATES = {"krona": 5e-4, "lokr": 5e-4, "lora": 1e-4}
BETAS, EPSILON, USUAL_DECAY = (0.9, 0.999), 1e-8, 1e-2
SECRETS = ("hub_token",)
# of this machine: nobody else's business, so neither in the adapter's file nor on its card
LOCAL = (
    "output_dir", "overwrite_output_dir", "instance_data_dir", "class_data_dir", "logging_dir", "cache_dir",
    "local_rank", "demo", "validation_prompt", "resume_from_checkpoint", "config",
    "bnb_quantization_config_path", "cache_to_disk",
)  # fmt: skip
PATHS_OR_IDS = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "dataset_name", "init_adapter")
NOT_EMPTY = (  # an empty path would be the current folder, another empty name what is there without the flag
    *(name for name in LOCAL if name not in ("validation_prompt", "demo", "overwrite_output_dir", "local_rank")),
    *PATHS_OR_IDS, "optimizer", "revision", "variant", "dataset_config_name", "dataset_split", "image_column",
    "caption_column", "aspect_ratio_buckets", "hub_model_id",
)  # fmt: skip
AT_LEAST_0 = (
    "max_grad_norm", "prior_loss_weight", "lr_warmup_steps", "learning_rate", "learning_rate_a", "learning_rate_b",
    "text_encoder_lr", "adam_weight_decay", "adam_weight_decay_text_encoder", "adam_epsilon", "guidance_scale",
    "dataloader_num_workers", "num_validation_images",
)  # fmt: skip
ABOVE_0 = ("snr_gamma", "alpha", "logit_std")
KRONA_FLAGS = ("krona_a_out", "krona_a_in", "strict_factors", "scaling", "init_weights", "layout")
DECIDED_BY_THE_FILE = (
    "krona_a_out", "krona_a_in", "rank", "layout", "alpha", "scaling", "target_modules", "text_encoder_target_modules",
    "adapter_dropout", "module_dropout", "init_weights", "strict_factors",
)  # fmt: skip
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": r"to_out\.0"}
CLASS_FLAGS = (
    "class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight", "prior_generation_precision",
    "sample_batch_size",
)  # fmt: skip
DATASET_FLAGS = ("dataset_config_name", "dataset_split", "image_column")
PRODIGY_FLAGS = ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup")
VALIDATION_FLAGS = (
    "num_validation_images", "validation_epochs", "validation_steps", "validation_inference_steps",
    "validation_guidance_scale",
)  # fmt: skip
QUANTIZED = "--bnb_quantization_config_path"
WARMING_UP = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup")
NOISE_FLAGS = ("snr_gamma", "noise_offset")
FLOW_FLAGS = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs", "resolution_shift")
SCHEMES = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")
TEXT_FLAGS = ("text_encoder_lr", "text_encoder_target_modules", "adam_weight_decay_text_encoder")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dreambooth_kron.py",
        description="DreamBooth with a Kronecker adapter (or LoRA, or LoKr) for text-to-image models of many families.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    group = parser.add_argument_group("demo")
    group.add_argument(
        "--demo",
        metavar="SUBJECT",
        help="Train on a shipped subject and the shipped pipeline (what no arguments do); "
        "other flags override its settings.",
    )
    group.add_argument(
        "--compare_with", choices=("lora", "none"), default="lora", help="What --demo trains and shows beside KronA."
    )

    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with flags, `name: value` per line; those given here go before it."
    )

    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", help="Pipeline folder or Hub id.")
    group.add_argument("--pretrained_vae_model_name_or_path", help="Another VAE, e.g. the fp16 fix for SDXL.")
    group.add_argument("--revision", help="Revision of the pipeline on the Hub.")
    group.add_argument("--variant", help="Variant of the weight files, e.g. fp16.")
    group.add_argument("--cache_dir", help="Where downloads are kept.")
    group.add_argument("--train_text_encoder", action="store_true", help="SD, SDXL, SD3, FLUX.1: adapt CLIP too.")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--instance_data_dir", help="Folder with the images (itself, or its `input` folder), or one image."
    )
    group.add_argument("--dataset_name", help="A dataset for `datasets.load_dataset`, instead of a folder.")
    group.add_argument("--dataset_config_name", help="The dataset's configuration.")
    group.add_argument("--dataset_split", default="train", help="The dataset's split.")
    group.add_argument("--image_column", default="image", help="Column with the image.")
    group.add_argument(
        "--caption_column", help="Column (or key of metadata.jsonl, where `text` is the default) with the caption."
    )
    group.add_argument("--instance_prompt", help="Prompt with the identifier; used for images that have no caption.")
    group.add_argument("--repeats", type=positive_int, default=1, help="How often an epoch shows each image.")
    group.add_argument("--resolution", type=positive_int, help="Side of the images; default: what the pipeline makes.")
    group.add_argument("--center_crop", action="store_true", help="Crop the centre; default: a random part.")
    group.add_argument("--random_flip", action="store_true", help="Flip half of the images horizontally.")
    group.add_argument("--image_interpolation_mode", default="lanczos", choices=INTERPOLATIONS, help="For resizing.")
    group.add_argument(
        "--aspect_ratio_buckets",
        metavar="BUCKETS",
        help='"auto", or "height,width;height,width;..."; each image goes '
        "to the nearest shape, and a batch has one shape.",
    )
    group.add_argument("--caption_dropout", type=probability, default=0.0, help="How often a caption is left empty.")
    group.add_argument("--cache_latents", action="store_true", help="Encode each image once. Fixes its random crop.")
    group.add_argument(
        "--cache_to_disk",
        metavar="FOLDER",
        help="Keep text embeddings and cached latents in this folder, not in memory; later runs find them there.",
    )
    group.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that load images.")

    group = parser.add_argument_group("prior preservation")
    group.add_argument("--with_prior_preservation", action="store_true", help="Also train on images of the class.")
    group.add_argument("--class_data_dir", help="Folder of class images; missing ones are generated into it.")
    group.add_argument("--class_prompt", help="Prompt of the class images, e.g. 'a photo of a dog'.")
    group.add_argument("--num_class_images", type=positive_int, default=100, help="How many there should be.")
    group.add_argument("--prior_loss_weight", type=float, default=1.0, help="Weight of their loss.")
    group.add_argument(
        "--prior_generation_precision",
        choices=("no", "fp32", "fp16", "bf16"),
        help="Default: fp16 on a GPU, else fp32.",
    )
    group.add_argument("--sample_batch_size", type=positive_int, default=4, help="Class images generated at once.")

    group = parser.add_argument_group("adapter")
    group.add_argument("--adapter_type", choices=tuple(LEARNING_RATES), default="krona", help="What is trained.")
    group.add_argument(
        "--init_adapter",
        metavar="FILE_OR_FOLDER",
        help="Start from this adapter: KronA, LoKr, LoRA or released DiffuseKronA, a file, folder or Hub id. Targets, "
        "factors and scale are its own.",
    )
    group.add_argument(
        "--target_modules",
        nargs="+",
        help="Modules to adapt: names, or one regular expression. Default: those of diffusers' script for the family.",
    )
    group.add_argument("--text_encoder_target_modules", nargs="+", help="Default: q_proj k_proj v_proj out_proj.")
    group.add_argument("--krona_a_out", type=positive_int, default=64, help="Rows of A (the paper's a2).")
    group.add_argument("--krona_a_in", type=positive_int, default=4, help="Columns of A (the paper's a1).")
    for part in "qkvo":
        group.add_argument(f"--krona_unet_{part}_a_out", type=positive_int, help=f"The same for the denoiser's {part}.")
        group.add_argument(f"--krona_unet_{part}_a_in", type=positive_int, help=f"The same for its {part}.")
    group.add_argument(
        "--strict_factors",
        action="store_true",
        help="Stop where a factor does not divide a layer's size; default: take the largest divisor below it.",
    )
    group.add_argument(
        "--rank", type=positive_int, help="KronA: number of Kronecker terms (default 1). LoRA, LoKr: rank (default 4)."
    )
    group.add_argument("--alpha", type=float, help="Scale. Default: 1 for KronA, the rank for LoRA and LoKr.")
    group.add_argument(
        "--scaling",
        choices=("alpha", "rank", "rslora", "cdka"),
        default="alpha",
        help="KronA: how the scale follows from alpha.",
    )
    group.add_argument(
        "--init_weights",
        choices=("diffusekrona", "kaiming", "cdka"),
        default="diffusekrona",
        help="KronA: initialisation.",
    )
    group.add_argument(
        "--layout",
        choices=("kron", "diffusekrona"),
        default="kron",
        help="KronA: the paper's product, or what the released DiffuseKronA code computes.",
    )
    group.add_argument(
        "--adapter_dropout",
        "--lora_dropout",
        type=probability,
        default=0.0,
        dest="adapter_dropout",
        help="Dropout on the adapter's input (LoKr: on its rank).",
    )
    group.add_argument(
        "--module_dropout", type=probability, default=0.0, help="How often a layer's adapter is skipped."
    )
    group.add_argument("--lokr_factor", type=int, default=-1, help="LoKr: its decompose_factor.")
    group.add_argument("--use_dora", action="store_true", help="LoRA: weight-decomposed (DoRA).")

    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", default="krona-dreambooth-model", help="Where everything is written.")
    group.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="Start anew although --output_dir has checkpoints of another run; they are deleted.",
    )
    group.add_argument("--seed", type=int, default=0, help="Fixes everything that is random.")
    group.add_argument("--train_batch_size", type=positive_int, default=4, help="Images per process and micro-step.")
    group.add_argument("--num_train_epochs", type=positive_int, help="Passes over the images.")
    group.add_argument("--max_train_steps", type=positive_int, help="Overrides --num_train_epochs. Default: 500.")
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="Micro-steps per update.")
    group.add_argument("--gradient_checkpointing", action="store_true", help="Less memory, more time.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Clip gradients; 0: do not.")
    group.add_argument(
        "--bnb_quantization_config_path",
        metavar="FILE",
        help="JSON with bitsandbytes' settings: the frozen denoiser in 4 or 8 bits (on a GPU).",
    )
    group.add_argument("--bnb_quantize_text_encoders", action="store_true", help="The frozen text encoders as well.")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: accelerate's setting.")
    group.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products.")
    group.add_argument("--snr_gamma", type=float, help="SD, SDXL: min-SNR loss weights; 5.0 is usual.")
    group.add_argument("--noise_offset", type=float, default=0.0, help="SD, SDXL: adds a constant to the noise.")
    group.add_argument(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="Default: PyTorch's scaled_dot_product_attention.",
    )
    group.add_argument("--torch_compile", action="store_true", help="Compile the denoiser's blocks.")
    group.add_argument("--offload", action="store_true", help="Keep VAE and text encoders on the CPU while not in use.")
    group.add_argument("--local_rank", type=int, default=-1, help="Set by launchers.")

    group = parser.add_argument_group("flow matching (every family but SD 1.x, 2.x and SDXL)")
    group.add_argument("--weighting_scheme", choices=SCHEMES, help="Default: logit_normal on SD3, else none.")
    group.add_argument("--logit_mean", type=float, default=0.0, help="Mean of logit_normal.")
    group.add_argument("--logit_std", type=float, default=1.0, help="Standard deviation of logit_normal.")
    group.add_argument("--mode_scale", type=float, default=1.29, help="Scale of mode.")
    group.add_argument(
        "--precondition_outputs", type=int, choices=(0, 1), help="Loss of the image, not velocity; default: 1 on SD3."
    )
    group.add_argument(
        "--resolution_shift",
        action="store_true",
        help="Shift sigmas with the images' size as the pipeline does when it samples; default: as diffusers' scripts.",
    )
    group.add_argument("--guidance_scale", type=float, default=3.5, help="What guidance-distilled models are told.")
    group.add_argument("--max_sequence_length", type=positive_int, help="Tokens of a prompt; default: the pipeline's.")

    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--optimizer",
        default="AdamW",
        help="AdamW, prodigy, schedulefree, or a class of torch.optim, or "
        "any importable class such as package.module.Class.",
    )
    group.add_argument("--optimizer_args", nargs="*", default=[], metavar="NAME=VALUE", help="More of its arguments.")
    group.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes.")
    group.add_argument("--learning_rate", type=float, help="Default: 5e-4 (LoRA: 1e-4; Prodigy: 1).")
    group.add_argument("--learning_rate_a", type=float, help="Another one for A (LoRA's lora_A, LoKr's w1).")
    group.add_argument("--learning_rate_b", type=float, help="Another one for B (LoRA's lora_B, LoKr's w2).")
    group.add_argument("--text_encoder_lr", type=float, help="Default: 1/20 of --learning_rate.")
    group.add_argument("--scale_lr", action="store_true", help="Multiply by processes, accumulation and batch size.")
    group.add_argument("--lr_scheduler", choices=SCHEDULES, default="constant", help="Schedule of the learning rate.")
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="For the schedules that have a warm-up.")
    group.add_argument("--lr_num_cycles", type=int, default=1, help="For cosine_with_restarts.")
    group.add_argument("--lr_power", type=float, default=1.0, help="For polynomial.")
    group.add_argument("--lr_step_rules", help='For piecewise_constant, e.g. "1:100,0.1:400,0.01".')
    group.add_argument("--adam_beta1", type=float, default=BETAS[0], help="Also Prodigy's and schedule-free's.")
    group.add_argument("--adam_beta2", type=float, default=BETAS[1], help="The same.")
    group.add_argument("--adam_epsilon", type=float, default=EPSILON, help="The same.")
    group.add_argument("--adam_weight_decay", type=float, default=USUAL_DECAY, help="For every optimizer that has it.")
    group.add_argument("--adam_weight_decay_text_encoder", type=float, help="Default: --adam_weight_decay.")
    group.add_argument("--prodigy_beta3", type=float, help="Default: the root of beta2.")
    for name in ("decouple", "use_bias_correction", "safeguard_warmup"):
        group.add_argument(f"--prodigy_{name}", type=boolean, default=True, help="Prodigy's argument of this name.")

    group = parser.add_argument_group("checkpoints")
    group.add_argument("--checkpointing_steps", type=positive_int, default=500, help="Save the state every N updates.")
    group.add_argument("--checkpoints_total_limit", type=positive_int, help="Keep so many; the oldest goes first.")
    group.add_argument("--resume_from_checkpoint", help='A checkpoint folder, or "latest".')

    group = parser.add_argument_group("feedback")
    group.add_argument("--validation_prompt", nargs="+", help="Prompt(s) for images made during and after training.")
    group.add_argument("--num_validation_images", type=int, default=4, help="Images per prompt.")
    group.add_argument("--validation_epochs", type=positive_int, default=50, help="Make them every N epochs ...")
    group.add_argument("--validation_steps", type=positive_int, help="... or every N updates.")
    group.add_argument("--validation_inference_steps", type=positive_int, default=25, help="Steps of the sampler.")
    group.add_argument(
        "--validation_guidance_scale", type=float, help="Default: 7 for Stable Diffusion (the paper's best)."
    )
    group.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, comet_ml, all or none.")
    group.add_argument("--logging_dir", default="logs", help="Under --output_dir.")

    group = parser.add_argument_group("output")
    group.add_argument(
        "--export",
        choices=("auto", "lokr", "lora", "loha", "none"),
        default="auto",
        help="Also write one file for ComfyUI, A1111 and others; auto takes the format that holds the adapter exactly.",
    )
    group.add_argument(
        "--output_kohya_format", action="store_true", help="The diffusers scripts' name of --export auto."
    )
    group.add_argument("--push_to_hub", action="store_true", help="Upload the output folder.")
    group.add_argument("--hub_model_id", help="Repository; default: the name of --output_dir.")
    group.add_argument("--hub_token", help="Token; better: `hf auth login`.")
    return parser


def parse_args(argv: Sequence[str] | None, demo_settings: Any = None) -> argparse.Namespace:
    """Parse and check. `demo_settings(subject)` gives the defaults that --demo sets.

    Raises:
        TrainingError: if flags are missing or contradict each other.
    """
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    if args.config:
        argv = [*read_config(args.config, parser), *argv]  # the last one counts
        args = parser.parse_args(argv)
    if args.demo is not None:
        parser.set_defaults(**demo_settings(args.demo))
        args = parser.parse_args(argv)
    if args.init_adapter:
        left_to_the_file(args, given(parser, argv))
    check(args)
    if int(os.environ.get("LOCAL_RANK", 0)) <= 0:
        for note in without_effect(args, parser):
            print(f"warning: {note}")
    complete(args)
    if int(os.environ.get("LOCAL_RANK", 0)) <= 0 and (why := unfit_export(args)):
        print(f"warning: --export {args.export} will write no file: {why}.")
    return args


def given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> set[str]:
    """Names of the flags that are there, whatever their values."""
    nothing = object()
    args = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), nothing))
    return {name for name, value in vars(parser.parse_args(argv, args)).items() if value is not nothing}


def left_to_the_file(args: argparse.Namespace, given: set[str]) -> None:
    """--init_adapter: None for all that it decides, unless that was asked for, too.

    Raises:
        TrainingError: names a flag that can have no part in it.
    """
    reasons = {
        "init_weights": "the weights start as the file's",
        "adapter_type": "every file is read as KronA, also LoRA and LoKr",
        **dict.fromkeys(
            (f"krona_unet_{p}_{a}" for p in PROJECTIONS for a in ("a_out", "a_in")), "its layers have their own factors"
        ),
    }
    for name, why in reasons.items():
        if name in given and not (name == "adapter_type" and args.adapter_type == "krona"):
            raise TrainingError(f"--{name} {getattr(args, name)} contradicts --init_adapter: {why}. Drop one of them.")
    for name in DECIDED_BY_THE_FILE:
        if name not in given:
            setattr(args, name, None)


def check(args: argparse.Namespace) -> None:
    def require(condition: Any, message: str) -> None:
        if not condition:
            raise TrainingError(message)

    require(
        args.pretrained_model_name_or_path,
        "--pretrained_model_name_or_path is missing: give a pipeline folder or a "
        "Hub id, or use --demo for the shipped one.",
    )
    sources = [args.instance_data_dir, args.dataset_name]
    require(any(sources), "No training images: give --instance_data_dir FOLDER or --dataset_name NAME.")
    require(not all(sources), "--instance_data_dir and --dataset_name were both given; keep one of them.")
    for name in NOT_EMPTY:
        require(
            getattr(args, name) != "", f"--{name} is empty: was it given by a variable that is not set? Drop the flag."
        )
    for name in ("adam_beta1", "adam_beta2", "prodigy_beta3"):
        value = getattr(args, name)
        require(value is None or 0 <= value < 1, f"--{name} {value}: expected at least 0 and below 1.")
    for name in AT_LEAST_0:
        value = getattr(args, name)
        require(value is None or value >= 0, f"--{name} {value}: expected at least 0.")
    for name, value in vars(args).items():
        finite = not isinstance(value, float) or math.isfinite(value) or name in ("max_grad_norm", "noise_offset")
        require(finite or name in ABOVE_0, f"--{name} {value}: expected a finite number.")
    for name in ABOVE_0:
        value = getattr(args, name)
        require(value is None or 0 < value < math.inf, f"--{name} {value}: expected a number above 0.")
    require(0 <= args.seed < 2**32, f"--seed {args.seed}: expected an integer from 0 to {2**32 - 1}.")
    require(
        args.learning_rate != 0 or (args.learning_rate_a is None and args.learning_rate_b is None),
        "--learning_rate 0 with --learning_rate_a or --learning_rate_b: expected above 0, as the text encoder's rates "
        "follow from their ratio to it. To keep one factor as it is, give 0 for that factor alone.",
    )
    require(
        not (args.bnb_quantize_text_encoders and args.train_text_encoder),
        "--bnb_quantize_text_encoders with --train_text_encoder: only frozen text encoders are quantized; drop one.",
    )
    if args.with_prior_preservation:
        for name in ("class_data_dir", "class_prompt"):
            require(getattr(args, name), f"--with_prior_preservation needs --{name}.")
    if args.adapter_type != "krona":
        given = [
            f"--krona_unet_{p}_{a}" for p in "qkvo" for a in ("a_out", "a_in") if getattr(args, f"krona_unet_{p}_{a}")
        ]
        require(not given, f"{', '.join(given)}: only for --adapter_type krona, not {args.adapter_type}.")
    require(
        not args.use_dora or args.adapter_type == "lora",
        f"--use_dora is for --adapter_type lora, not {args.adapter_type}.",
    )
    require(
        not (args.use_8bit_adam and args.optimizer.lower() != "adamw"),
        f"--use_8bit_adam is for --optimizer AdamW, not {args.optimizer}.",
    )
    require(
        args.lr_scheduler != "piecewise_constant" or args.lr_step_rules,
        "--lr_scheduler piecewise_constant needs --lr_step_rules.",
    )
    if args.optimizer.lower() == "prodigy":
        require(
            args.learning_rate_a is None and args.learning_rate_b is None and args.text_encoder_lr is None,
            "Prodigy finds one learning rate for all parameters: drop --learning_rate_a, --learning_rate_b and "
            "--text_encoder_lr.",
        )
    if args.report_to == "wandb":
        require(args.hub_token is None, "--report_to wandb would publish --hub_token; use `hf auth login` instead.")


def without_effect(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """A sentence for each group of flags that were given but do nothing here."""

    kind, schedule, optimizer = args.adapter_type, args.lr_scheduler, args.optimizer.lower()
    cases = (
        (KRONA_FLAGS, kind != "krona", "only with --adapter_type krona"),
        (("module_dropout",), kind == "lora", "only with --adapter_type krona or lokr"),
        (("lokr_factor",), kind != "lokr", "only with --adapter_type lokr"),
        (CLASS_FLAGS, not args.with_prior_preservation, "only with --with_prior_preservation"),
        (DATASET_FLAGS, not args.dataset_name, "only with --dataset_name"),
        (("num_train_epochs",), args.max_train_steps, "--max_train_steps overrides it"),
        (
            ("lr_warmup_steps",),
            schedule not in WARMING_UP and optimizer != "schedulefree",
            f"only with --lr_scheduler {', '.join(WARMING_UP)}, or --optimizer schedulefree",
        ),
        (("lr_num_cycles",), schedule != "cosine_with_restarts", "only with --lr_scheduler cosine_with_restarts"),
        (("lr_power",), schedule != "polynomial", "only with --lr_scheduler polynomial"),
        (("lr_step_rules",), schedule != "piecewise_constant", "only with --lr_scheduler piecewise_constant"),
        (("cache_to_disk",), args.train_text_encoder and not args.cache_latents, "only with --cache_latents here"),
        (("bnb_quantize_text_encoders",), not args.bnb_quantization_config_path, f"only with {QUANTIZED}"),
        (PRODIGY_FLAGS, optimizer != "prodigy", "only with --optimizer prodigy"),
        (VALIDATION_FLAGS, not args.validation_prompt, "only with --validation_prompt"),
        (("validation_epochs",), args.validation_steps and args.validation_prompt, "--validation_steps overrides it"),
        (("compare_with",), not args.demo or kind != "krona", "only with --demo and --adapter_type krona"),
        (("hub_token",), not args.push_to_hub, "only with --push_to_hub"),
        (("logging_dir",), args.report_to == "none", "only with a tracker in --report_to"),
        (("revision",), os.path.isdir(args.pretrained_model_name_or_path), "the model is a folder on this disk"),
        (TEXT_FLAGS, not args.train_text_encoder, "only with --train_text_encoder"),
    )
    return idle_flags(args, parser, cases)


def idle_flags(args: argparse.Namespace, parser: argparse.ArgumentParser, cases: Sequence[tuple]) -> list[str]:
    """A sentence for each of the cases (names, whether they do nothing, why) with flags that were given."""

    def given(names: Sequence[str]) -> list[str]:
        return [f"--{name}" for name in names if getattr(args, name) != parser.get_default(name)]

    return [f"{', '.join(given(names))} has no effect: {why}." for names, idle, why in cases if idle and given(names)]


def check_family(args: argparse.Namespace, family: type[Family]) -> None:
    """Raises TrainingError if flags ask for what this family does not have."""
    if args.train_text_encoder and not family.trained_text:
        raise TrainingError(
            f"--train_text_encoder: the text encoders of {family.title} are not trained, only CLIP, which Stable "
            "Diffusion and FLUX.1 have; drop the flag."
        )
    length, limit = args.max_sequence_length, family.sequence[1] if family.sequence else None
    if limit and length and length > limit:
        raise TrainingError(f"--max_sequence_length {length}: {family.title} reads at most {limit} tokens.")


def without_effect_on(args: argparse.Namespace, family: Family) -> list[str]:
    """As `without_effect`, for what the family decides."""
    parser, flow = build_parser(), family.objective == "flow"
    scheme = args.weighting_scheme or family.weighting
    cases = (
        (NOISE_FLAGS, flow, f"{family.title} is trained by flow matching"),
        (FLOW_FLAGS, not flow, f"{family.title} is trained to predict noise, not by flow matching"),
        (("logit_mean", "logit_std"), flow and scheme != "logit_normal", "only with --weighting_scheme logit_normal"),
        (("mode_scale",), flow and scheme != "mode", "only with --weighting_scheme mode"),
        (("resolution_shift",), flow and not family.shifts(), "this pipeline's scheduler does not shift with the size"),
        (("guidance_scale",), not family.distilled, "this model is not guidance-distilled"),
        (("max_sequence_length",), not family.sequence, f"{family.title} reads prompts of one length"),
    )
    return idle_flags(args, parser, cases)


def unfit_export(args: argparse.Namespace) -> str | None:
    """Why the format that was asked for cannot hold what is trained, and which can; None if it can."""
    if args.use_dora and args.export != "none":
        return "DoRA rescales the base weights, which no other file than PEFT's has; take --export none"
    if args.export not in ("lokr", "loha") or args.adapter_type == "lokr":
        return None
    if args.rank is not None and args.rank > 1:
        return f"it holds one term a layer, and --rank is {args.rank}; take --export auto"
    if args.export == "lokr" and args.layout == "diffusekrona" and args.adapter_type == "krona":
        return "--layout diffusekrona is no plain Kronecker product; take --export auto"
    return None


def complete(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other flags."""
    for name in ("AdamW", "prodigy", "schedulefree"):  # in any case; a resumed run compares them
        if args.optimizer.lower() == name.lower():
            args.optimizer = name
    prodigy = args.optimizer == "prodigy"
    if args.learning_rate is None:
        args.learning_rate = 1.0 if prodigy else LEARNING_RATES[args.adapter_type]
    if args.text_encoder_lr is None:
        args.text_encoder_lr = args.learning_rate if prodigy else args.learning_rate / 20
    if args.rank is None and not args.init_adapter:
        args.rank = 1 if args.adapter_type == "krona" else 4
    if args.alpha is None and not args.init_adapter:
        args.alpha = 1.0 if args.adapter_type == "krona" else float(args.rank)
    if args.adam_weight_decay_text_encoder is None:
        args.adam_weight_decay_text_encoder = args.adam_weight_decay
    if args.num_train_epochs is None and args.max_train_steps is None:
        args.max_train_steps = 500
    if args.output_kohya_format and args.export == "none":
        args.export = "auto"
    args.target_modules = modules(args.target_modules)
    args.text_encoder_target_modules = modules(args.text_encoder_target_modules)
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))


def compared(args: argparse.Namespace, rates: Mapping[str, float]) -> argparse.Namespace | None:
    """What --demo trains beside KronA: all the same with LoRA, in a folder beside; None if nothing is to be compared.

    `rates`: the demo's learning rates; LoRA's are in their proportion, whatever the flags say, and an update takes as
    large a part of its weights away: AdamW takes the rate times the decay.
    """
    if not args.demo or args.adapter_type != "krona" or args.init_adapter or args.compare_with == "none":
        return None
    other = copy.copy(args)
    other.adapter_type, other.rank, other.alpha, other.export = "lora", 4, 4.0, "none"
    other.output_dir, other.push_to_hub = f"{args.output_dir}-lora", False
    for name in ("learning_rate", "text_encoder_lr", "learning_rate_a", "learning_rate_b"):
        if getattr(args, name) is not None:
            setattr(other, name, getattr(args, name) * rates["lora"] / rates["krona"])
    for name in ("adam_weight_decay", "adam_weight_decay_text_encoder"):
        setattr(other, name, getattr(args, name) * rates["krona"] / rates["lora"])
    if args.resume_from_checkpoint != "latest":
        other.resume_from_checkpoint = None  # a checkpoint of the other training
    return other


def adapter_name(args: argparse.Namespace) -> str:
    """What a table calls the adapter.

    >>> adapter_name(argparse.Namespace(adapter_type="lora", rank=4))
    'LoRA r=4'
    """
    if args.adapter_type == "krona":
        return f"KronA ({args.krona_a_out},{args.krona_a_in})" + (f" r={args.rank}" if args.rank != 1 else "")
    return {"lora": "LoRA", "lokr": "LoKr"}[args.adapter_type] + f" r={args.rank}"


def adapter_config(args: argparse.Namespace, part: str, usual: Sequence[str] = ATTENTION) -> PeftConfig:
    """The adapter's settings for the denoiser ("unet" or "transformer") or a text encoder.

    `usual`: the denoiser's layers if no flag names others.

    Raises:
        TrainingError: if a value is not allowed.
    """
    if part != "text_encoder":
        flag, targets = "--target_modules", args.target_modules or list(usual)
    else:
        flag, targets = "--text_encoder_target_modules", args.text_encoder_target_modules or TEXT_TARGETS
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise TrainingError(
                f"The target modules of the {part} are not a valid regular expression ({error}): correct {flag}, or "
                "give names such as to_q to_k."
            ) from error
    try:
        if args.adapter_type == "lora":
            return LoraConfig(
                r=args.rank, lora_alpha=args.alpha, target_modules=targets, lora_dropout=args.adapter_dropout,
                init_lora_weights="gaussian", use_dora=args.use_dora,
            )  # fmt: skip
        if args.adapter_type == "lokr":
            return LoKrConfig(
                r=args.rank, alpha=args.alpha, target_modules=targets, rank_dropout=args.adapter_dropout,
                module_dropout=args.module_dropout, decompose_factor=args.lokr_factor,
            )  # fmt: skip
        return KronAConfig(
            target_modules=targets, a_out=args.krona_a_out, a_in=args.krona_a_in, r=args.rank, alpha=args.alpha,
            scaling=args.scaling, layout=args.layout, init_weights=args.init_weights,
            krona_dropout=args.adapter_dropout, module_dropout=args.module_dropout,
            factor_pattern=factor_pattern(args) if part != "text_encoder" else {}, strict_factors=args.strict_factors,
        )  # fmt: skip
    except KronAError as error:
        raise TrainingError(str(error)) from error


def factor_pattern(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Factors of q, k, v and o where they differ from the global ones."""
    pattern = {}
    for letter, module in PROJECTIONS.items():
        own = getattr(args, f"krona_unet_{letter}_a_out"), getattr(args, f"krona_unet_{letter}_a_in")
        if any(own):
            pattern[module] = own[0] or args.krona_a_out, own[1] or args.krona_a_in
    return pattern


def modules(names: list[str] | None) -> list[str] | str | None:
    """Names as given ("to_q,to_k" or "to_q" "to_k"), or a regular expression as one string."""
    if not names:
        return None
    if len(names) == 1 and re.search(r"[*+?()\[\]|\\^$]", names[0]):
        return names[0]
    return [part for name in names for part in name.split(",") if part]


def settings(args: argparse.Namespace) -> dict[str, str | int | float | bool]:
    """The arguments as trackers and metadata take them, without secrets."""
    plain = {k: v for k, v in vars(args).items() if v is not None and k not in SECRETS}
    return {k: v if isinstance(v, (str, int, float, bool)) else str(v) for k, v in plain.items()}


def public_settings(args: argparse.Namespace) -> dict[str, str | int | float | bool]:
    """The settings that may leave this machine: without local paths."""
    shown = {k: v for k, v in settings(args).items() if k not in LOCAL}
    return {k: v for k, v in shown.items() if not (k in PATHS_OR_IDS and os.path.exists(v))}


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, received {text!r}")
    return value


def probability(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 <= value < 1):
        raise argparse.ArgumentTypeError(f"expected a number from 0 up to but not 1, received {text!r}")
    return value


def boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, received {text!r}")
