# SPDX-License-Identifier: Apache-2.0
"""Text to image with a saved adapter, for every family that dreambooth_kron.py trains (SDXL also with the refiner).

    python examples/generate.py --adapter my-dog --prompt "a sks dog on the moon" "a sks dog in the rain" --seed 0 1 2
    python examples/generate.py --adapter my-dog --prompt "a sks dog on the moon" --compare --scale 0.8 --merged

Every pair of prompt and seed is one image, in a file "<number of the prompt>-<its words>-<seed>-<base or adapter>.png";
files of these names in --output_dir are replaced. The base model is the one that the adapter was trained on, unless
--pretrained_model_name_or_path names another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.dreambooth.interrupts import end_at_once, exit_with, interrupts

if __name__ == "__main__":
    end_at_once()  # as long as it takes to import what follows

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

from examples.dreambooth import TrainingError, adapters, families, memory, one_line
from examples.dreambooth.arguments import positive_int
from examples.dreambooth.evaluate import (
    AREAS,
    SIDES,
    check_area,
    check_steps,
    exact_decoding,
    for_sampling,
    load_pipeline,
    only_variant,
)
from examples.dreambooth.files import aside
from examples.dreambooth.prompts import say_cut
from peft_krona import merged
from peft_krona.convert import read_adapter
from peft_krona.errors import KronAError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--adapter", help="Folder or file of a trained adapter, or an id on the Hub.")
    parser.add_argument("--pretrained_model_name_or_path", help="Base model; default: the one in the adapter's config.")
    parser.add_argument("--variant", help="Variant of the base model's files; default: that which is there.")
    parser.add_argument("--revision", help="Revision of the base model on the Hub.")
    parser.add_argument("--refiner", help="SDXL: a refiner pipeline for the last steps.")
    parser.add_argument("--refiner_start", type=share, default=0.8, help="Share of the steps before the refiner.")
    parser.add_argument("--prompt", nargs="+", required=True, help="One or more.")
    parser.add_argument("--negative_prompt", help="What not to show.")
    parser.add_argument("--seed", nargs="+", type=seed_number, default=[0], help="One or more (default: 0).")
    parser.add_argument("--scale", type=finite, default=1.0, help="Strength of the adapter; 0 is the base model.")
    parser.add_argument(
        "--merged", action="store_true", help="Merge the KronA adapter into the weights while sampling."
    )
    parser.add_argument("--compare", action="store_true", help="Also draw with the base model, rows side by side.")
    parser.add_argument("--num_inference_steps", type=positive_int, default=50, help="The paper's (default: 50).")
    parser.add_argument(
        "--guidance_scale", type=finite, help="Default: the family's; SD 7, which the paper finds best."
    )
    size = f"Default: what the pipeline makes; at most {SIDES} times that, and {AREAS} times its area."
    parser.add_argument("--height", type=positive_int, help=size)
    parser.add_argument("--width", type=positive_int, help=size)
    parser.add_argument("--batch_size", type=positive_int, default=4, help="Images at once (default: 4).")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="Default: fp16 on a GPU, else fp32.")
    parser.add_argument("--device", type=device_name, help="Default: the GPU, if there is one.")
    parser.add_argument("--offload", action="store_true", help="Keep models on the CPU until they are needed.")
    parser.add_argument("--output_dir", default="output/generated", help="Default: output/generated.")
    return parser


def seed_number(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**64 - 1, received {text!r}")
    return value


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, received {text!r}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, received {text!r}")
    return value


def device_name(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # the latter: torch was built without this kind of device
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f"expected a device such as cpu or cuda:0, received {text!r} ({reason})"
        ) from error
    return text


def main(args: argparse.Namespace) -> list[Path]:
    """Draw, save, return the files; the grid is the last."""
    diffusers.utils.logging.set_verbosity_error()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.dtype or ("fp16" if device.startswith("cuda") else "fp32")]
    jobs = [(prompt, seed) for prompt in args.prompt for seed in args.seed]
    configs = adapter_configs(args.adapter)
    if args.merged:
        check_merging(args.adapter, configs)
    base = args.pretrained_model_name_or_path or base_model(args.adapter, configs)
    output = writable_folder(args.output_dir)  # before the work, not after it
    pipe = load_pipeline(base, dtype, variant=args.variant, revision=args.revision)
    check_size(pipe, args.height, args.width)
    family = families.of(pipe)
    check_area(pipe, family.resolution(), {"--height": args.height, "--width": args.width})
    check_steps(pipe, "--num_inference_steps", args.num_inference_steps)
    if args.negative_prompt is not None and not family.negative:
        raise TrainingError(f"--negative_prompt: {family.title} has no use for one; leave it out.")
    say_cut(family.windows(), [*args.prompt, *filter(None, [args.negative_prompt])], print)
    refiner = load_refiner(args, pipe, dtype)
    for part in filter(None, (pipe, refiner)):
        part.enable_model_cpu_offload(device=device) if args.offload else part.to(device)

    rows = []
    if args.compare or not args.adapter:
        rows.append(("base", draw(pipe, refiner, jobs, args)))
    if args.adapter:
        components = adapters.load(pipe, args.adapter, weight=args.scale)
        print(f"{args.adapter}: adapter on {', '.join(components)}, strength {args.scale:g}")
        with merged_models([getattr(pipe, name) for name in components] if args.merged else []):
            rows.append(("adapter", draw(pipe, refiner, jobs, args)))

    n = len(args.seed)
    files = []
    for kind, images in rows:
        for i, ((prompt, seed), image) in enumerate(zip(jobs, images, strict=True)):
            path = output / f"{i // n + 1:02d}-{slug(prompt)}-{seed}-{kind}.png"
            with aside(path) as temporary:
                image.save(temporary)
            files.append(path)
    # a row per prompt; with --compare two: base above adapter
    cells = [i for p in range(len(args.prompt)) for _, images in rows for i in images[p * n : p * n + n]]
    grid = output / "grid.png"
    with aside(grid) as temporary:
        make_image_grid(cells, rows=len(cells) // n, cols=n).save(temporary)
    print("\n".join(map(str, [*files, grid])))
    return [*files, grid]


def adapter_configs(adapter: str | None) -> dict[Path, dict[str, Any]]:
    """{file: PEFT config} of an adapter's folder, or of the folders in it; none for a file or an id on the Hub.

    Raises:
        TrainingError: if there is no such adapter, or a config is broken.
    """
    if adapter is None:
        return {}
    path = Path(adapter)
    if not path.exists() and (adapter.count("/") != 1 or adapter.startswith((".", "/", "~"))):
        raise TrainingError(
            f"--adapter {adapter} does not exist: expected a trained adapter's folder or file, or an id on the Hub."
        )
    files = [path / "adapter_config.json"]
    files = files if files[0].is_file() else sorted(path.glob("*/adapter_config.json"))
    configs = {}
    for file in files:
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError(f"{file} is no config of an adapter: {error}. Save the adapter again.") from error
        if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
            raise TrainingError(
                f"{file} is no config of an adapter: expected a table with peft_type in it, got "
                f"{json.dumps(config)[:60]}. Save the adapter again."
            )
        configs[file] = config
    return configs


def check_merging(adapter: str | None, configs: dict[Path, dict[str, Any]]) -> None:
    """Only KronA is merged here. What comes as a single file or model is read as KronA, whatever it was.

    Raises:
        TrainingError: names the other kind.
    """
    other = [
        c["peft_type"] for file, c in configs.items() if file.parent != Path(adapter) and c["peft_type"] != "KRONA"
    ]
    if other:
        raise TrainingError(f"--merged is for KronA; --adapter {adapter} is of type {other[0]}. Leave --merged out.")


def base_model(adapter: str | None, configs: dict[Path, dict[str, Any]]) -> str:
    """What the adapter's configs, or the metadata of its file, name as the base model.

    Raises:
        TrainingError: if nothing does.
    """
    if adapter is None:
        raise TrainingError("No base model: give --pretrained_model_name_or_path, or --adapter with one that names it.")
    named = {file: config.get("base_model_name_or_path") for file, config in configs.items()}
    if not configs and Path(adapter).exists():
        named = {Path(adapter): read_adapter(adapter).metadata.get("base_model")}
    file, name = next(((f, n) for f, n in named.items() if isinstance(n, str) and n), (None, None))
    if name is None:
        where = "does not name the one it was trained on" if Path(adapter).exists() else "is not on this disk"
        raise TrainingError(f"No base model: --adapter {adapter} {where}; give --pretrained_model_name_or_path.")
    # a folder is named from the adapter's own, which is the file's, or one or two above it (a component, a checkpoint)
    for folder in file.resolve().parents[:3]:
        if (folder / name / "model_index.json").is_file():
            return str(folder / name)
    return name


def writable_folder(path: str) -> Path:
    """The folder, made if need be.

    Raises:
        TrainingError: if files cannot be written there.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise TrainingError(f"--output_dir {path}: expected a folder to write to; {error}. Name another.") from error
    return folder


def check_size(pipe: Any, height: int | None, width: int | None) -> None:
    """That the pipeline makes images of this size, and not of one near it.

    Raises:
        TrainingError: names the sizes that it makes.
    """
    multiple = pipe.vae_scale_factor * 2 if getattr(pipe, "transformer", None) is not None else 8
    multiple = math.lcm(multiple, pipe.vae_scale_factor)
    for flag, value in (("height", height), ("width", width)):
        if value is not None and value % multiple:
            below = value // multiple * multiple
            near = [str(size) for size in (below, below + multiple) if size]
            raise TrainingError(
                f"--{flag} {value}: a {type(pipe).__name__} makes multiples of {multiple}; give {' or '.join(near)}."
            )


def load_refiner(args: argparse.Namespace, pipe: Any, dtype: torch.dtype) -> Any:
    if not args.refiner:
        return None
    if getattr(pipe, "text_encoder_2", None) is None:
        raise TrainingError(f"--refiner is for SDXL; the base model is a {type(pipe).__name__}.")
    try:  # the refiner's second text encoder and VAE are the base's
        refiner = DiffusionPipeline.from_pretrained(
            args.refiner, vae=pipe.vae, variant=only_variant(Path(args.refiner))
        )
    except (OSError, ValueError) as error:
        raise TrainingError(f"--refiner {args.refiner} could not be loaded: {error}") from error
    return refiner.to(dtype)


def draw(pipe: Any, refiner: Any, jobs: list[tuple[str, int]], args: argparse.Namespace) -> list:
    """An image per job; each has its own generator, so that it does not depend on the others."""
    common = families.of(pipe).sampling(args.guidance_scale) | {"num_inference_steps": args.num_inference_steps}
    negative = common.pop("negative_prompt", None) if args.negative_prompt is None else args.negative_prompt
    images = []
    for start in range(0, len(jobs), args.batch_size):
        part = jobs[start : start + args.batch_size]
        settings = common | {"prompt": [prompt for prompt, _ in part]}
        if negative is not None:
            settings["negative_prompt"] = [negative] * len(part)
        size = {"height": args.height, "width": args.width}
        with torch.no_grad(), for_sampling(pipe), exact_decoding(pipe.vae) as whole:
            if refiner is None:
                images += pipe(**settings, **size, generator=generators(part)).images
                check_finite(part, whole)
                continue
            latents = pipe(
                **settings, **size, generator=generators(part), denoising_end=args.refiner_start, output_type="latent"
            ).images
            with for_sampling(refiner):
                images += refiner(
                    **settings, image=latents, generator=generators(part), denoising_start=args.refiner_start
                ).images
            check_finite(part, whole)
    return images


def check_finite(jobs: list[tuple[str, int]], whole: list[bool]) -> None:
    """Raises TrainingError if an image would be black because its values are not finite."""
    if not all(whole):
        prompt, seed = jobs[whole.index(False)]
        raise TrainingError(
            f"The image of {prompt!r}, seed {seed}, has values that are not finite: try --dtype bf16 or fp32, or "
            "another --scale."
        )


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
    """The words of a prompt, in any script; cut so that a name of four-byte characters is no longer than disks allow.

    >>> slug("A dog, 犬!")
    'a-dog-犬'
    """
    return re.sub(r"[\W_]+", "-", prompt.lower())[:45].strip("-") or "prompt"


def run(argv: list[str]) -> int:
    with interrupts.handled():
        try:
            main(build_parser().parse_args(argv))
            return 0
        except (TrainingError, KronAError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as error:
            if not memory.is_too_little(error):
                raise
            print(
                f"error: not enough memory ({one_line(error)[:200]}): try a smaller --height and --width, --batch_size "
                "1, --offload or --dtype bf16.",
                file=sys.stderr,
            )
            return 2
        except KeyboardInterrupt:
            return interrupts.ended()


if __name__ == "__main__":
    exit_with(run)
