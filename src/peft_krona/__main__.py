# SPDX-License-Identifier: Apache-2.0
"""python -m peft_krona convert | inspect | merge | extract | plan | run"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import plan, run
from .choices import LAYOUTS
from .convert import (
    BASES,
    FORMATS,
    AdapterFile,
    UNetNames,
    base_of_folder,
    check_base,
    export,
    from_difference,
    guess_base,
    read_adapter,
    shapes_of_folder,
)
from .convert.checkpoints import read_component
from .convert.merge_pipeline import merge_pipeline
from .errors import FormatError, KronAError
from .inspection import check_picture_name, inspect_adapter, plot, shares, table

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 after an error, which is printed in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [run.NAME]:  # the script's errors and arguments are its own
        return run.main(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (KronAError, OSError) as error:
        print(f"error: {_in_flags(str(error))}", file=sys.stderr)
        return 1
    return 0


# The library's messages name its arguments; here they are the flags that set them.
_FLAGS = (
    (r"\bto='(\w+)'", r"--to \1"),
    (r"\bsplit_terms=True\b", "--split-terms"),
    (r"\bdtype=torch\.float32\b", "--dtype fp32"),
    (r"\bscale \(AdapterFile\.scaled\)", "--scale"),
    (r"\bbase_model=(\S+?):", r"--base \1:"),
    (r"\bbase_model: ", "--base "),
    (r"\bbase_model\b", "--base"),
    (r"\bcomponent='(\w+)'", r"--component \1"),
    (r"\bbudget='([^']*)'", r"--budget \1"),
    (r"\btarget_modules\b", "--target-modules"),
    (r"\bpicture='([^']*)'", r"--plot \1"),
)


def _in_flags(message: str) -> str:
    """A message of the library in the words of the command line.

    >>> _in_flags("Use to='lora' or split_terms=True.")
    'Use --to lora or --split-terms.'
    """
    for argument, flag in _FLAGS:
        message = re.sub(argument, flag, message)
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m peft_krona", description="Kronecker adapters: files in and out.")
    commands = parser.add_subparsers(required=True, metavar="convert|inspect|merge|extract|plan|run")

    convert = commands.add_parser("convert", help="any adapter to a file for another tool, or to a PEFT folder")
    convert.add_argument("input", help="PEFT folder, released DiffuseKronA checkpoint, LoKr or LoRA file")
    convert.add_argument("output", help="file to write; with --to peft a new folder")
    convert.add_argument("--to", choices=FORMATS, default="auto", help="format; auto picks the smallest exact one")
    convert.add_argument("--base", metavar="sd15|sd2|sdxl|FOLDER", help="base model, for names and checks")
    convert.add_argument("--dtype", choices=DTYPES, help="of the weights; fp16 for files, unchanged for peft")
    convert.add_argument("--scale", type=float, default=1.0, metavar="S", help="multiply the update by S")
    convert.add_argument("--split-terms", action="store_true", help="one file per Kronecker term")
    convert.add_argument("--trigger", metavar="WORDS", help="trigger words, for the metadata")
    convert.set_defaults(run=_convert)

    inspect = commands.add_parser("inspect", help="what an adapter changes, layer by layer")
    inspect.add_argument("input", help="any adapter that convert reads")
    inspect.add_argument("--plot", metavar="OUT.png", help="draw it as well")
    inspect.add_argument("--base", metavar="FOLDER", help="the base pipeline, for ||dW|| / ||W||")
    inspect.set_defaults(run=_inspect)

    merge = commands.add_parser("merge", help="a pipeline with an adapter merged into its weights")
    merge.add_argument("pipeline", help="folder of a diffusers pipeline")
    merge.add_argument("adapter", help="any adapter that convert reads")
    merge.add_argument("output", help="new folder")
    merge.add_argument("--scale", type=float, default=1.0, metavar="S", help="multiply the update by S")
    merge.add_argument("--dtype", choices=DTYPES, help="of the weights; each component's own if left out")
    merge.set_defaults(run=_merge)

    extract = commands.add_parser("extract", help="the nearest adapter to the difference of two models")
    extract.add_argument(
        "before", help="the base model: a safetensors file (a whole checkpoint too), or a component's folder"
    )
    extract.add_argument("after", help="the fine-tuned model's")
    extract.add_argument("output", help="new PEFT folder")
    extract.add_argument("--a-out", type=int, default=64)
    extract.add_argument("--a-in", type=int, default=4)
    extract.add_argument("--r", type=int, default=1, help="Kronecker terms")
    extract.add_argument("--layout", choices=LAYOUTS, default="kron")
    extract.add_argument("--component", default="unet", help="the part of the pipeline that the weights are of")
    extract.set_defaults(run=_extract)

    command = commands.add_parser(plan.NAME, help=plan.HELP)
    plan.add_arguments(command)
    command.set_defaults(run=plan.run)
    commands.add_parser(run.NAME, help=run.HELP)  # for --help: `main` goes there at once
    return parser


def _convert(options: argparse.Namespace) -> None:
    base, shapes = _base(options.base)
    adapter = read_adapter(options.input, base, shapes)
    if shapes is not None:
        adapter = adapter.fitted(shapes)
    elif base is not None:
        check_base(adapter, options.base)
    adapter = adapter.scaled(options.scale)
    if options.trigger:
        adapter = replace(adapter, metadata={**adapter.metadata, "trigger_words": options.trigger})
    if base is None and options.to != "peft" and _names_need_base(adapter):
        base = guess_base(adapter)
    print(f"read {len(adapter)} layers ({adapter.source}) from {options.input}")
    dtype = DTYPES[options.dtype] if options.dtype else None
    report = export(adapter, options.output, options.to, base_model=base, dtype=dtype, split_terms=options.split_terms)
    print(_in_flags(str(report)))


def _base(name: str | None) -> tuple[UNetNames | None, Mapping[str, Mapping[str, tuple[int, ...]]] | None]:
    """The base model's kind and, if its folder was given, its layers' shapes."""
    if name is None:
        return None, None
    if name in BASES:
        return BASES[name], None
    if not Path(name).is_dir():
        raise FormatError(f"--base {name}: expected one of {', '.join(BASES)}, or the folder of a pipeline.")
    return base_of_folder(name), shapes_of_folder(name)


def _names_need_base(adapter: AdapterFile) -> bool:
    """Names in files for UNet pipelines depend on the base model; those for transformers do not."""
    return all(component == "unet" or component.startswith("text_encoder") for component in adapter.components)


def _inspect(options: argparse.Namespace) -> None:
    if options.plot:
        check_picture_name(options.plot)
    adapter = read_adapter(options.input)
    stats = inspect_adapter(adapter, options.base)
    print(table(stats))
    if options.base:
        for component, share in shares(adapter, options.base).items():
            print(f"{component}: KronA adapts {share}")
    if options.plot:
        plot(stats, options.plot, Path(options.input).name)
        print(f"wrote {options.plot}")


def _merge(options: argparse.Namespace) -> None:
    adapter = read_adapter(options.adapter).scaled(options.scale)
    dtype = DTYPES[options.dtype] if options.dtype else None
    out = merge_pipeline(options.pipeline, adapter, options.output, dtype)
    print(f"merged {len(adapter)} layers into {options.pipeline}, wrote {out}")


def _extract(options: argparse.Namespace) -> None:
    adapter, errors = from_difference(
        *_comparable(
            read_component(options.before, options.component), read_component(options.after, options.component)
        ),
        options.a_out,
        options.a_in,
        r=options.r,
        layout=options.layout,
        component=options.component,
    )
    for name, error in errors.items():
        print(f"{error:8.2%} of dW is lost in {name}")
    print(export(adapter, options.output, "peft"))


def _comparable(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights that both models have, in the same shape and dtype; what is left out is printed."""
    shapes = {key: (before[key].shape, after[key].shape) for key in before if key in after}
    for key in sorted(before.keys() ^ after.keys()):
        if key.endswith(".weight"):
            print(f"left out {key}: only one of the two models has it")
    for key, (one, other) in shapes.items():
        if one != other:
            print(f"left out {key}: its shape is {tuple(one)} and {tuple(other)}")
    common = [key for key, (one, other) in shapes.items() if one == other]
    coarser = [key for key in common if before[key].dtype != after[key].dtype]
    if coarser:
        print(
            f"{len(coarser)} weights have two dtypes: the finer are rounded to the coarser, so that this is no change"
        )
    for key in coarser:
        dtype = min(before[key].dtype, after[key].dtype, key=lambda dtype: (dtype.itemsize, -torch.finfo(dtype).eps))
        before[key], after[key] = before[key].to(dtype), after[key].to(dtype)
    return {key: before[key] for key in common}, {key: after[key] for key in common}


if __name__ == "__main__":
    sys.exit(main())
