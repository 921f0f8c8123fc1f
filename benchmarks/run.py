# SPDX-License-Identifier: Apache-2.0
"""Run a benchmark suite and write its numbers as JSON.

    python -m benchmarks.run --suite layer --device cpu --out benchmarks/results/layer-cpu.json
    python -m benchmarks.run --suite unet --device cuda --dtype bfloat16 --out benchmarks/results/unet-cuda.json
    python -m benchmarks.report benchmarks/results/*.json

`layer`: one adapted Linear, forward and forward + backward, added to the frozen layer. `scaling`: the same as tokens,
width, r or the number of active adapters grow. `unet`: one training step of a real UNet (random weights). `inference`:
one denoising step of it, without gradients, KronA merged and not. `qkv`: what q, k and v would gain by sharing x.
`benchmarks/gpu.sh` runs all of them on a GPU.

All providers of a case run once in every repetition, in a new order each time; ratios are medians of the ratios within
a repetition. A provider whose output is not base + dW x is reported as wrong, without a speed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_krona.ops import backend

from .cases import FACTORS, LAYERS, POINT, SCALING, UNETS
from .measure import copy_bandwidth, environment, interleaved, median_added, median_ratio, peak_bytes, quantiles
from .providers import CUDA_ONLY, PROVIDERS, Adapted
from .qkv import qkv_steps


def layer_suite(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every layer of `cases.LAYERS` with every factor pair and provider."""
    rows = []
    for case in LAYERS:
        if args.only and args.only not in case.name:
            continue
        for a_out, a_in in FACTORS:
            torch.manual_seed(0)
            linear = nn.Linear(case.n_in, case.n_out, dtype=args.dtype, device=args.device).requires_grad_(False)
            x = torch.randn(case.tokens, case.n_in, dtype=args.dtype, device=args.device, requires_grad=True)
            dy = torch.randn(case.tokens, case.n_out, dtype=args.dtype, device=args.device)
            built = {name: _build(name, linear, a_out, a_in, args) for name in args.providers}
            wrong = {name: error for name, m in built.items() if (error := _numeric_error(m, linear, x)) is not None}
            good = {name: m for name, m in built.items() if name not in wrong}
            label = f"{case.name} ({a_out},{a_in})"
            forward = interleaved(
                {n: _no_grad(m, x) for n, m in good.items()}, args.repetitions, args.device, label + " forward"
            )
            both = {n: _forward_backward(m, x, dy) for n, m in good.items()}
            training = interleaved(both, args.repetitions, args.device, label + " training")
            for name in built:
                row = {"case": case._asdict(), "factors": [a_out, a_in], "provider": name}
                row["trainable"] = sum(p.numel() for p in built[name].parameters() if p.requires_grad)
                if name in wrong:
                    rows.append({**row, "wrong": wrong[name]})
                    continue
                row["peak_bytes"] = peak_bytes(both[name], args.device)
                for kind, times in (("forward", forward), ("training", training)):
                    row[kind] = {
                        **quantiles(times[name]),
                        "added": median_added(times[name], times["frozen"]),
                        "over_frozen": median_ratio(times[name], times["frozen"]),
                    }
                rows.append(row)
            _print_layer(label, rows[-len(built) :])
    return rows


def _build(name: str, linear: nn.Linear, a_out: int, a_in: int, args: argparse.Namespace) -> Adapted:
    base = copy.deepcopy(linear) if "LyCORIS" in name else linear  # LyCORIS patches the layer itself
    return PROVIDERS[name](base, a_out, a_in).to(args.device).train()


def _numeric_error(module: Adapted, linear: nn.Linear, x: torch.Tensor) -> str | None:
    """None if the output is base + dW x up to rounding, else what it is off by."""
    with torch.no_grad():
        delta = module.delta_weight()
        weight = linear.weight.double() + (0 if delta is None else delta.double())
        expected = torch.nn.functional.linear(x[:64].double(), weight, linear.bias.double())
        error = ((module(x[:64]).double() - expected).norm() / expected.norm()).item()
    # bf16 keeps 8 bits; a product of three roundings each well within two of its ulps
    allowed = 8 * torch.finfo(x.dtype).eps
    return None if error <= allowed else f"relative error {error:.1e} (allowed {allowed:.1e})"


def _no_grad(module: Adapted, x: torch.Tensor):
    def step() -> None:
        with torch.no_grad():
            module(x)

    return step


def _forward_backward(module: Adapted, x: torch.Tensor, dy: torch.Tensor):
    parameters = [p for p in module.parameters() if p.requires_grad]

    def step() -> None:
        torch.autograd.grad(module(x), [x, *parameters], dy)

    return step


def scaling_suite(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One square layer through get_peft_model: what it costs as one of `cases.SCALING` grows."""
    from peft import LoraConfig, get_peft_model

    from peft_krona import KronAConfig

    rows = []
    for axis, values in SCALING.items():
        for value in values:
            point = POINT | {axis: value}
            width, n_adapters = point["width"], point["adapters"]
            torch.manual_seed(0)
            x = torch.randn(point["tokens"], width, dtype=args.dtype, device=args.device, requires_grad=True)
            linear = nn.Linear(width, width, dtype=args.dtype, device=args.device).requires_grad_(False)
            rank = 4 * point["r"]
            lora = LoraConfig(target_modules=["0"], r=rank, lora_alpha=rank, init_lora_weights=False)
            krona = KronAConfig(target_modules=["0"], r=point["r"], a_out=64, a_in=4, init_weights=False)
            forward, training = {}, {}
            for name, config in (("frozen", None), ("PEFT LoRA 4 r", lora), *_on_backends("KronA", krona, args)):
                model = nn.Sequential(linear)
                if config is not None:
                    model = get_peft_model(model, config)
                    names = ["default", *(f"adapter{n}" for n in range(1, n_adapters))]
                    for other in names[1:]:
                        model.add_adapter(other, config)
                    model.base_model.set_adapter(names)
                forward[name] = _on(_backend_of(name), _no_grad(model, x))
                training[name] = _on(_backend_of(name), _forward_backward(model, x, torch.randn_like(x)))
            label = f"{axis} {value}"
            forward = interleaved(forward, args.repetitions, args.device, label + " forward")
            training = interleaved(training, args.repetitions, args.device, label + " training")
            for name in forward:
                row = {"axis": axis, **point, "provider": name}
                for kind, times in (("forward", forward), ("training", training)):
                    row[kind] = {**quantiles(times[name]), "added": median_added(times[name], times["frozen"])}
                print(
                    f"{label:14} {name:16} forward +{row['forward']['added'] * 1e3:8.3f} ms   "
                    f"training +{row['training']['added'] * 1e3:8.3f} ms"
                )
                rows.append(row)
    return rows


def qkv_suite(args: argparse.Namespace) -> list[dict[str, Any]]:
    """q, k and v of SDXL's self-attention, forward + backward, adapted one by one and together."""
    rows = []
    for case in LAYERS:
        if case.n_in != case.n_out or (args.only and args.only not in case.name):
            continue
        for a_out, a_in in FACTORS:
            steps = qkv_steps(case.tokens, case.n_in, a_out, a_in, args.dtype, args.device)
            times = interleaved(steps, args.repetitions, args.device, f"{case.name} ({a_out},{a_in})")
            for name in steps:
                row = {"case": case._asdict(), "factors": [a_out, a_in], "provider": name}
                row["training"] = {**quantiles(times[name]), "added": median_added(times[name], times["frozen"])}
                row["peak_bytes"] = peak_bytes(steps[name], args.device)
                rows.append(row)
                print(
                    f"{case.name} ({a_out},{a_in}) {name:12} {row['training']['p50'] * 1e3:8.2f} ms  "
                    f"+{row['training']['added'] * 1e3:7.2f} ms  peak {row['peak_bytes'] / 2**20:7.1f} MiB"
                )
    return rows


def _on_backends(name: str, config: Any, args: argparse.Namespace) -> list[tuple[str, Any]]:
    """The configuration as it is, and on a GPU with the Triton kernels and with the quickest implementation too."""
    others = ("triton", "auto") if args.device == "cuda" else ()
    return [(name, config), *((f"{name}, {other}", config) for other in others)]


def _backend_of(provider: str) -> str:
    other = provider.rpartition(", ")[2]
    return other if other in ("triton", "auto") else "torch"


def _on(name: str, step):
    """The step with the Kronecker products on one backend."""

    def run() -> None:
        before, backend.DEFAULT = backend.DEFAULT, name
        try:
            step()
        finally:
            backend.DEFAULT = before

    return run


def unet_suite(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One training step (forward, MSE loss, backward) of real UNets with every attention projection adapted."""
    return _unets(args, "training", {})


def inference_suite(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One denoising step (forward, no gradients), with KronA beside the weights and merged into them."""
    from peft_krona import KronAConfig

    merged = KronAConfig(target_modules=ATTENTION, a_out=64, a_in=4, init_weights=False)
    return _unets(args, "forward", {"KronA (64,4), merged": merged})


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def _unets(args: argparse.Namespace, kind: str, more: dict[str, Any]) -> list[dict[str, Any]]:
    from diffusers import UNet2DConditionModel
    from peft import LoKrConfig, LoraConfig, get_peft_model

    from peft_krona import KronAConfig

    configs = {
        "PEFT LoRA r=4": LoraConfig(target_modules=ATTENTION, r=4, lora_alpha=4),
        "PEFT LoKr": LoKrConfig(target_modules=ATTENTION, r=32, alpha=32, decompose_factor=-1),
    }
    for a_out, a_in in FACTORS:
        config = KronAConfig(target_modules=ATTENTION, a_out=a_out, a_in=a_in)
        configs |= dict(_on_backends(f"KronA ({a_out},{a_in})", config, args))
    configs |= more
    rows = []
    for unet_name, (unet_config, latent_sizes) in UNETS.items():
        if args.only and args.only != unet_name:
            continue
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**unet_config).to(args.device, args.dtype).requires_grad_(False)
        if args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        size = latent_sizes[args.device == "cuda"]
        inputs = _unet_inputs(unet_config, size, args)
        times: dict[str, list[float]] = {}
        # One UNet, its adapter swapped between repetitions: several would not fit.
        names, order = ["frozen", *configs], random.Random(0)
        for _ in range(args.repetitions):
            for name in order.sample(names, len(names)):
                model = get_peft_model(unet, copy.deepcopy(configs[name])) if name in configs else unet
                model.train(kind == "training")
                if name.endswith(", merged"):
                    model.merge_adapter()
                step = _unet_step(model, inputs) if kind == "training" else _unet_forward(model, inputs)
                step = _on(_backend_of(name), step)
                elapsed = interleaved({name: step}, args.steps, args.device, f"{unet_name} {name}")[name]
                times.setdefault(name, []).extend(elapsed)
                if len(times[name]) == args.steps:
                    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
                    row = {"unet": unet_name, "latents": size, "batch": args.batch, "provider": name}
                    row |= {"trainable": trainable, "peak_bytes": peak_bytes(step, args.device)}
                    rows.append(row)
                if name.endswith(", merged"):
                    model.unmerge_adapter()
                if name in configs:
                    unet = model.unload()
                    unet.requires_grad_(False)
        rows.sort(key=lambda row: (list(UNETS).index(row["unet"]), names.index(row["provider"])))
        for row in rows:
            if row["unet"] == unet_name:
                mine = times[row["provider"]]
                row[kind] = {
                    **quantiles(mine),
                    "over_frozen": median_ratio(mine, times["frozen"]),
                    "over_lora": median_ratio(mine, times["PEFT LoRA r=4"]),
                }
                print(
                    f"{unet_name:6} {row['provider']:22} {row[kind]['p50']:8.3f} s  x{row[kind]['over_frozen']:.3f}"
                    f" frozen  x{row[kind]['over_lora']:.3f} LoRA  peak {row['peak_bytes'] / 2**20:8.0f} MiB"
                )
    return rows


def _unet_inputs(config: dict[str, Any], size: int, args: argparse.Namespace) -> dict[str, Any]:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=args.dtype, device=args.device)

    inputs = {
        "sample": noise(args.batch, 4, size, size).requires_grad_(),
        "timestep": torch.full((args.batch,), 500, device=args.device),
        "encoder_hidden_states": noise(args.batch, 77, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        time_ids = torch.full((args.batch, 6), 1024.0, dtype=args.dtype, device=args.device)
        inputs["added_cond_kwargs"] = {"text_embeds": noise(args.batch, 1280), "time_ids": time_ids}
    return inputs


def _unet_step(model: nn.Module, inputs: dict[str, Any]):
    leaves = [inputs["sample"], *(p for p in model.parameters() if p.requires_grad)]

    def step() -> None:
        torch.autograd.grad(model(**inputs).sample.float().square().mean(), leaves)

    return step


def _unet_forward(model: nn.Module, inputs: dict[str, Any]):
    inputs = {name: t.detach() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}

    def step() -> None:
        with torch.inference_mode():
            model(**inputs)

    return step


def _print_layer(label: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{label}")
    for row in rows:
        if "wrong" in row:
            print(f"  {row['provider']:22} WRONG: {row['wrong']}")
            continue
        times = (
            f"{kind} {row[kind]['p50'] * 1e3:8.2f} ms  +{row[kind]['added'] * 1e3:7.2f}"
            for kind in ("forward", "training")
        )
        print(f"  {row['provider']:22} {'   '.join(times)}   peak {row['peak_bytes'] / 2**20:7.1f} MiB")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run the suite, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = {
        "layer": layer_suite,
        "scaling": scaling_suite,
        "unet": unet_suite,
        "inference": inference_suite,
        "qkv": qkv_suite,
    }
    parser.add_argument("--suite", choices=tuple(suites), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--steps", type=int, default=1, help="unet, inference: steps timed per swap of adapters")
    parser.add_argument("--batch", type=int, default=1, help="unet, inference: images per step")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="unet suite")
    parser.add_argument("--only", help="only the cases whose name contains this")
    parser.add_argument("--providers", nargs="+", choices=tuple(PROVIDERS), metavar="NAME", help="layer suite")
    args = parser.parse_args(argv)
    if not args.providers:
        args.providers = [name for name in PROVIDERS if args.device == "cuda" or name not in CUDA_ONLY]
    if args.threads:
        torch.set_num_threads(args.threads)
    if "frozen" not in args.providers:
        args.providers.insert(0, "frozen")
    result = {
        "suite": args.suite,
        "dtype": args.dtype,
        "repetitions": args.repetitions,
        "steps": args.steps,
        "gradient_checkpointing": args.gradient_checkpointing,
        "environment": environment(args.device),
        "copy_bytes_per_second": copy_bandwidth(args.device),
    }
    args.dtype = getattr(torch, args.dtype)
    result["rows"] = suites[args.suite](args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.out.with_name(args.out.name + ".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, args.out)
        print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
