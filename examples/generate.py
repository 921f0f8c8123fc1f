# SPDX-License-Identifier: Apache-2.0
"""Text to image with a saved adapter, for Stable Diffusion and SDXL (with or without the refiner).

    python examples/generate.py --adapter my-dog --prompt "a sks dog on the moon" "a sks dog in the rain" --seed 0 1 2
    python examples/generate.py --adapter my-dog --prompt "a sks dog on the moon" --compare --scale 0.8 --merged

Every pair of prompt and seed is one image. The base model is the one that the adapter was trained on, unless
--pretrained_model_name_or_path names another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.dreambooth import TrainingError
from examples.dreambooth.adapters import load_adapters
from examples.dreambooth.evaluate import for_sampling, load_pipeline
from peft_krona import merged
from peft_krona.errors import KronAError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--adapter", help="Folder of a trained adapter, or an id on the Hub.")
    parser.add_argument("--pretrained_model_name_or_path", help="Base model; default: the one in the adapter's config.")
    parser.add_argument("--refiner", help="SDXL: a refiner pipeline for the last steps.")
    parser.add_argument("--refiner_start", type=float, default=0.8, help="Share of the steps before the refiner.")
    parser.add_argument("--prompt", nargs="+", required=True, help="One or more.")
    parser.add_argument("--negative_prompt", help="What not to show.")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="One or more (default: 0).")
    parser.add_argument("--scale", type=float, default=1.0, help="Strength of the adapter; 0 is the base model.")
    parser.add_argument("--merged", action="store_true", help="Merge the adapter into the weights while sampling.")
    parser.add_argument("--compare", action="store_true", help="Also draw with the base model, rows side by side.")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="The paper's (default: 50).")
    parser.add_argument("--guidance_scale", type=float, default=7.0, help="The paper finds 7 best (default).")
    parser.add_argument("--height", type=int, help="Default: what the pipeline makes.")
    parser.add_argument("--width", type=int, help="Default: what the pipeline makes.")
    parser.add_argument("--batch_size", type=int, default=4, help="Images at once (default: 4).")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="Default: fp16 on a GPU, else fp32.")
    parser.add_argument("--device", help="Default: the GPU, if there is one.")
    parser.add_argument("--offload", action="store_true", help="Keep models on the CPU until they are needed.")
    parser.add_argument("--output_dir", default="output/generated", help="Default: output/generated.")
    return parser


def main(args: argparse.Namespace) -> list[Path]:
    """Draw, save, return the files; the grid is the last."""
    diffusers.utils.logging.set_verbosity_error()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.dtype or ("fp16" if device.startswith("cuda") else "fp32")]
    jobs = [(prompt, seed) for prompt in args.prompt for seed in args.seed]
    pipe = load_pipeline(base_model(args), dtype)
    refiner = load_refiner(args, pipe, dtype)
    for part in filter(None, (pipe, refiner)):
        part.enable_model_cpu_offload(device=device) if args.offload else part.to(device)

    rows = []
    if args.compare or not args.adapter:
        rows.append(("base", draw(pipe, refiner, jobs, args)))
    if args.adapter:
        components = load_adapters(pipe, args.adapter, weight=args.scale)
        print(f"{args.adapter}: adapter on {', '.join(components)}, strength {args.scale:g}")
        with merged_models([getattr(pipe, name) for name in components] if args.merged else []):
            rows.append(("adapter", draw(pipe, refiner, jobs, args)))

    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for kind, images in rows:
        for (prompt, seed), image in zip(jobs, images, strict=True):
            path = output / f"{slug(prompt)}-{seed}-{kind}.png"
            image.save(path)
            files.append(path)
    # a row per prompt; with --compare two: base above adapter
    n = len(args.seed)
    cells = [i for p in range(len(args.prompt)) for _, images in rows for i in images[p * n : p * n + n]]
    grid = output / "grid.png"
    make_image_grid(cells, rows=len(cells) // n, cols=n).save(grid)
    print("\n".join(map(str, [*files, grid])))
    return [*files, grid]


def base_model(args: argparse.Namespace) -> str:
    """--pretrained_model_name_or_path, or what the adapter's config names.

    Raises:
        TrainingError: if neither does.
    """
    if args.pretrained_model_name_or_path:
        return args.pretrained_model_name_or_path
    configs = sorted(Path(args.adapter).glob("*/adapter_config.json")) if args.adapter else []
    for path in configs:
        name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if name:
            return name
    raise TrainingError(
        f"No base model: --adapter {args.adapter} does not name the one it was trained on; give "
        "--pretrained_model_name_or_path."
    )


def load_refiner(args: argparse.Namespace, pipe: Any, dtype: torch.dtype) -> Any:
    if not args.refiner:
        return None
    if getattr(pipe, "text_encoder_2", None) is None:
        raise TrainingError(f"--refiner is for SDXL; the base model is a {type(pipe).__name__}.")
    try:  # the refiner's second text encoder and VAE are the base's
        refiner = DiffusionPipeline.from_pretrained(args.refiner, vae=pipe.vae)
    except (OSError, ValueError) as error:
        raise TrainingError(f"--refiner {args.refiner} could not be loaded: {error}") from error
    return refiner.to(dtype)


def draw(pipe: Any, refiner: Any, jobs: list[tuple[str, int]], args: argparse.Namespace) -> list:
    """An image per job; each has its own generator, so that it does not depend on the others."""
    common = {
        "negative_prompt": args.negative_prompt,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
    }
    images = []
    for start in range(0, len(jobs), args.batch_size):
        part = jobs[start : start + args.batch_size]
        settings = common | {"prompt": [prompt for prompt, _ in part]}
        if args.negative_prompt is not None:
            settings["negative_prompt"] = [args.negative_prompt] * len(part)
        size = {"height": args.height, "width": args.width}
        with torch.no_grad(), for_sampling(pipe):
            if refiner is None:
                images += pipe(**settings, **size, generator=generators(part)).images
                continue
            latents = pipe(
                **settings, **size, generator=generators(part), denoising_end=args.refiner_start, output_type="latent"
            ).images
            with for_sampling(refiner):
                images += refiner(
                    **settings, image=latents, generator=generators(part), denoising_start=args.refiner_start
                ).images
    return images


def generators(jobs: list[tuple[str, int]]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for _, seed in jobs]


@contextlib.contextmanager
def merged_models(models: list[torch.nn.Module]) -> Iterator[None]:
    """All of the models merged; their weights are put back exactly."""
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(merged(model))
        yield


def slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]


def run(argv: list[str]) -> int:
    try:
        main(build_parser().parse_args(argv))
        return 0
    except (TrainingError, KronAError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
