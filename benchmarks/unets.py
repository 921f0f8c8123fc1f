# SPDX-License-Identifier: Apache-2.0
"""Steps of real UNets (random weights) with every attention projection adapted."""

from __future__ import annotations

import argparse
import copy
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from tqdm import tqdm

from peft_krona import KronAConfig

from . import cases
from .measure import clock, failure, interleaved, median_ratio, peak_bytes, quantiles
from .providers import backend_of, on_backend, on_backends

# Steps of a denoising run before it is timed, besides those of `interleaved`. The first ones after a swap of adapters,
# and above all after a merge, whose weights are new memory, took 1.1 to 1.2 times as long on a CPU.
WARM_UP = 3
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MERGED = ", merged"
Row = dict[str, Any]


class Variant(NamedTuple):
    """What else changes while one adapter is in the UNet."""

    batch: int
    gradient_checkpointing: bool


def adapters(suite: str) -> dict[str, Any]:
    """The PEFT configurations of a suite's providers; None is the frozen UNet."""
    configs: dict[str, Any] = {
        "frozen": None,
        "PEFT LoRA r=4": LoraConfig(target_modules=ATTENTION, r=4, lora_alpha=4),
        "PEFT LoKr": LoKrConfig(target_modules=ATTENTION, r=32, alpha=32, decompose_factor=-1),
    }
    for a_out, a_in in cases.FACTORS:
        config = KronAConfig(target_modules=ATTENTION, a_out=a_out, a_in=a_in)
        configs |= on_backends(f"KronA ({a_out},{a_in})", config)
    if suite == "inference":
        a_out, a_in = cases.FACTORS[0]
        config = KronAConfig(target_modules=ATTENTION, a_out=a_out, a_in=a_in, init_weights=False)
        configs[f"KronA ({a_out},{a_in}){MERGED}"] = config
    return configs


def unet_suite(args: argparse.Namespace) -> Iterator[list[Row]]:
    """One training step (forward, MSE loss, backward); all rows so far after each provider."""
    return _unets(args, "training")


def inference_suite(args: argparse.Namespace) -> Iterator[list[Row]]:
    """One denoising step (forward, no gradients), with KronA beside the weights and merged into them."""
    return _unets(args, "forward")


def _unets(args: argparse.Namespace, kind: str) -> Iterator[list[Row]]:
    rows: list[Row] = []
    for name in cases.UNETS:
        if not args.only or args.only in name:
            of_this: list[Row] = []
            for of_this in _one_unet(name, args, kind):
                yield rows + of_this
            rows += of_this
            _print_rows(of_this, kind)


def _one_unet(unet_name: str, args: argparse.Namespace, kind: str) -> Iterator[list[Row]]:
    """The rows so far after each provider. One UNet whose adapter is swapped: several would not fit."""
    from diffusers import UNet2DConditionModel

    config, sizes = cases.UNETS[unet_name]
    size = sizes[args.device == "cuda"]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(args.dtype)  # SDXL's would be 10 GiB in fp32 before it was cast
    try:
        with torch.device(args.device):
            unet = UNet2DConditionModel(**config)
    finally:
        torch.set_default_dtype(before)
    unet.to(args.dtype).requires_grad_(False)
    if args.compile:  # the blocks in _repeated_blocks, which are the transformer blocks; it lasts over the swaps
        unet.compile_repeated_blocks(backend=args.compile, dynamic=False)
    inputs = {batch: _inputs(config, size, batch, args) for batch in args.batch}
    variants = [Variant(batch, word == "on") for batch in args.batch for word in args.gradient_checkpointing]
    all_configs = adapters(args.suite)
    facts: dict[tuple[str, Variant], Row] = {}
    times: dict[tuple[str, Variant], list[float]] = {}
    for key in ((name, variant) for name in args.providers for variant in variants):
        row = {"unet": unet_name, "latents": size, **key[1]._asdict(), "compiled": bool(args.compile)}
        facts[key] = row | {"provider": key[0]}
    turns = [name for names in orders(args.providers, args.repetitions) for name in names]
    for name in tqdm(turns, desc=unet_name, leave=False):
        with _adapted(unet, all_configs[name], kind == "training", name.endswith(MERGED)) as model:
            for variant in variants:
                row = facts[name, variant]
                if "failed" in row:
                    continue
                _set_checkpointing(unet, variant.gradient_checkpointing)
                step = (_training_step if kind == "training" else _forward_step)(model, inputs[variant.batch])
                step = on_backend(backend_of(name), step)
                try:
                    times.setdefault((name, variant), []).extend(_measure(step, row, model, args))
                except Exception as error:  # mostly out of memory; the other variants may still run
                    row["failed"] = failure(error)
                    times.pop((name, variant), None)
                if "failed" in row:  # here the traceback, and with it what the step had allocated, is gone
                    _free(args.device)
        yield _with_times(facts, times, kind)


def orders(names: list[str], repetitions: int) -> Iterator[list[str]]:
    """Whose turn it is in every repetition: first as listed, so that a run cut short has what others are compared
    with, then in a new order each time."""
    draw = random.Random(0)
    for repetition in range(repetitions):
        yield draw.sample(names, len(names)) if repetition else names


def _measure(step: Callable[[], None], row: Row, model: nn.Module, args: argparse.Namespace) -> list[float]:
    """Seconds of some steps; the first time, parameters, peak memory and compilations go into the row too."""
    if args.compile:
        torch._dynamo.reset()
        counters.clear()
    label = f"{row['unet']} {row['provider']}, batch {row['batch']}"
    for _ in range(WARM_UP if args.suite == "inference" else 0):
        step()
    times = interleaved({"": step}, args.steps, args.device, label, timed=clock(args.device))[""]
    if "peak_bytes" not in row:
        row["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row["peak_bytes"] = peak_bytes(step, args.device)
        if args.compile:
            row["graph_breaks"] = sum(counters["graph_break"].values())
            row["compilations"] = counters["stats"]["unique_graphs"]
    return times


@contextmanager
def _adapted(unet: nn.Module, config: Any, training: bool, merged: bool) -> Iterator[nn.Module]:
    """The UNet with an adapter, as PEFT hands it out; afterwards without it."""
    if config is None:
        yield unet.train(training)
        return
    model = get_peft_model(unet, copy.deepcopy(config)).train(training)
    if merged:
        model.merge_adapter()
    try:
        yield model
    finally:
        if merged:
            model.unmerge_adapter()
        model.unload().requires_grad_(False)


def _set_checkpointing(unet: Any, on: bool) -> None:
    if on:
        unet.enable_gradient_checkpointing()
    else:
        unet.disable_gradient_checkpointing()


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _with_times(
    facts: dict[tuple[str, Variant], Row], times: dict[tuple[str, Variant], list[float]], kind: str
) -> list[Row]:
    """The rows of what has been measured, with ratios to the frozen UNet and to LoRA where those have been too."""
    rows = []
    for (name, variant), row in facts.items():
        if mine := times.get((name, variant)):
            ratios = {}
            for what, other in (("over_frozen", "frozen"), ("over_lora", "PEFT LoRA r=4")):
                reference = times.get((other, variant))
                ratios[what] = median_ratio(mine, reference) if reference else None
            rows.append(row | {kind: {**quantiles(mine), **ratios, "timed": len(mine)}})
        elif "failed" in row:
            rows.append(dict(row))
    return rows


def _inputs(config: dict[str, Any], size: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=args.dtype, device=args.device)

    inputs = {
        "sample": noise(batch, 4, size, size).requires_grad_(),
        "timestep": torch.full((batch,), 500, device=args.device),
        "encoder_hidden_states": noise(batch, 77, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        time_ids = torch.full((batch, 6), 1024.0, dtype=args.dtype, device=args.device)
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": noise(batch, pooled), "time_ids": time_ids}
    return inputs


def _training_step(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], None]:
    leaves = [inputs["sample"], *(p for p in model.parameters() if p.requires_grad)]

    def step() -> None:
        torch.autograd.grad(model(**inputs).sample.float().square().mean(), leaves)

    return step


def _forward_step(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], None]:
    inputs = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}

    def step() -> None:
        with torch.inference_mode():
            model(**inputs)

    return step


def _print_rows(rows: list[Row], kind: str) -> None:
    for row in rows:
        checkpointing = ", checkpointing" if row["gradient_checkpointing"] else ""
        what = f"{row['unet']:6} batch {row['batch']}{checkpointing} {row['provider']:22}"
        if "failed" in row:
            print(f"{what} FAILED: {row['failed']}")
            continue
        over = "".join(
            f"  x{row[kind][ratio]:.3f} {of}"
            for ratio, of in (("over_frozen", "frozen"), ("over_lora", "LoRA"))
            if row[kind][ratio] is not None
        )
        graphs = f"  {row['compilations']} graphs, {row['graph_breaks']} breaks" if row["compiled"] else ""
        print(f"{what} {row[kind]['p50']:8.3f} s{over}  peak {row['peak_bytes'] / 2**20:8.0f} MiB{graphs}")
