# SPDX-License-Identifier: Apache-2.0
"""`--init_adapter`: training goes on from an adapter that is there, whatever tool wrote it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from peft_krona import KronAConfig
from peft_krona.convert import (
    AdapterFile,
    LayerUpdate,
    nearest_kronecker,
    read_adapter,
    shapes_of_models,
    to_peft,
    tolerance,
)
from peft_krona.errors import KronAError
from peft_krona.factors import choose_factors
from peft_krona.pipelines import load_components, models_of
from peft_krona.sources import Components, find, plain_keys, read_own

from . import TrainingError

FACTORS = {"krona_a_out": "a_out", "krona_a_in": "a_in", "rank": "r", "layout": "layout"}
DROPOUTS = {"adapter_dropout": "krona_dropout", "module_dropout": "module_dropout"}
SCALES = {"alpha": "alpha", "scaling": "scaling"}
CLIP = "text_model."  # which some versions of transformers have in the names of CLIP's layers
TARGETS = {"target_modules": "denoiser", "text_encoder_target_modules": "text encoders"}


def begin(
    pipe: Any, source: str, denoiser: str, asked: Mapping[str, Any], train_text_encoder: bool, say: Callable
) -> dict[str, nn.Module]:
    """Add the adapter in `source`, trainable, under the name "default"; returns {component: adapted model}.

    Targets, factors, scale and layout are the file's. Every format is converted exactly, or refused.

    Args:
        pipe: the pipeline. source: a folder or file, or an id on the Hub: KronA, LoKr, LoRA, released DiffuseKronA.
        denoiser: its name in the pipeline.
        asked: the adapter's flags that were given, {name: value}. Factors, rank and layout that are not the file's are
            taken where they hold it exactly: a LoRA that was made of KronA is that KronA again. More terms than it
            needs start at zero.
        train_text_encoder: whether text encoders are trained; as the file has it.

    Raises:
        TrainingError: if it can't be read or does not fit the pipeline, or names the flag that contradicts it.
    """
    try:
        path = find(source)
        models = models_of(pipe)
        components = read_own(path, models)
        kind, dropouts = "KronA", {}
        if components is None or refactoring(components, asked):
            dropouts = {name: dropouts_of(config) for name, (config, _) in (components or {}).items()}
            adapter = read_adapter(path, shapes=shapes_of_models(models))
            kind = adapter.source
            components = to_peft(refactored(adapter, source, asked), models)
        check_components(source, components, denoiser, train_text_encoder)
        check_scales(source, components, asked)
        for component, (config, _) in components.items():
            config.inference_mode = False
            for flag, name in DROPOUTS.items():
                own = dropouts.get(component, dropouts_of(config))[name]
                setattr(config, name, own if asked.get(flag) is None else asked[flag])
        check_targets(source, components, denoiser, models, asked)
        load_components(pipe, components, "default", where=source)
    except (KronAError, OSError, ValueError) as error:
        raise TrainingError(f"--init_adapter {source} cannot be the start of a training: {error}") from error
    for name, (config, weights) in components.items():
        count = sum(key.endswith(".krona_A") for key in weights)
        say(f"{name} starts from {source} ({kind}): {count} layers, mostly {described(config)}")
    return {name: models[name] for name in components}


def matched(model: nn.Module, targets: Any) -> set[str]:
    """Names of the model's layers that PEFT adapts for these target modules."""
    config = KronAConfig(target_modules=targets)
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    named = (name for name, module in model.named_modules() if isinstance(module, kinds))
    return {name for name in named if check_target_module_exists(config, name)}


def dropouts_of(config: KronAConfig) -> dict[str, float]:
    return {name: getattr(config, name) for name in DROPOUTS.values()}


def described(config: KronAConfig) -> str:
    return f"({config.a_out}, {config.a_in}), r={config.r}, layout {config.layout}"


# -- other factors than the file's -------------------------------------------------------------------------------------


def refactoring(components: Components, asked: Mapping[str, Any]) -> bool:
    """Whether factors were asked for that are not those of these settings."""
    return any(
        asked.get(flag) is not None and (getattr(config, name) != asked[flag] or pattern_of(config, name))
        for config, _ in components.values()
        for flag, name in FACTORS.items()
    )


def pattern_of(config: KronAConfig, name: str) -> Mapping[str, Any]:
    """The pattern in which single layers have another value."""
    return {"r": config.rank_pattern, "layout": {}}.get(name, config.factor_pattern)


def refactored(adapter: AdapterFile, source: str, asked: Mapping[str, Any]) -> AdapterFile:
    """The same update of every layer in the factors, rank and layout that were asked for.

    Raises:
        TrainingError: names the flags and the first layer that they cannot hold, and how far off they are.
    """
    wanted = {name: asked[flag] for flag, name in FACTORS.items() if asked.get(flag) is not None}
    if not wanted:
        return adapter
    layers = []
    for layer in adapter:
        own = {"a_out": layer.factors[0], "a_in": layer.factors[1], "r": layer.r, "layout": layer.layout}
        to = own | wanted
        to["a_out"], to["a_in"] = choose_factors(
            *layer.shape[:2], to["a_out"], to["a_in"], strict=bool(asked.get("strict_factors")), layer=layer.name
        )
        if any(to[name] != own[name] for name in ("a_out", "a_in", "layout")) or to["r"] < own["r"]:
            plain = replace(layer, scale=1.0)
            A, B, error = nearest_kronecker(plain.delta_weight(), **to)
            if error > max(tolerance(layer.A.dtype), tolerance(torch.float32)):
                flags = ", ".join(f"--{flag} {asked[flag]}" for flag, name in FACTORS.items() if name in wanted)
                raise TrainingError(
                    f"{flags} contradicts --init_adapter {source}: {layer.name} is ({own['a_out']}, {own['a_in']}), "
                    f"r={own['r']}, layout {own['layout']} there, and no exact ({to['a_out']}, {to['a_in']}), "
                    f"r={to['r']}, layout {to['layout']}; the nearest is {error:.1%} off. Drop the flags, to train its "
                    "own factors."
                )
            kept = (A.flatten(1).norm(dim=1) * B.flatten(1).norm(dim=1)) > 0
            layer = replace(layer, A=A[kept].float(), B=B[kept].float()) if kept.any() else start_of(layer, A, B)
        layers.append(with_more_terms(layer, to["r"]))
    return replace(adapter, layers=tuple(layers))


def start_of(layer: LayerUpdate, A: torch.Tensor, B: torch.Tensor) -> LayerUpdate:
    """A layer whose update is zero, in these factors: as an adapter that was never trained."""
    A = torch.randn(1, *A.shape[1:]) / A.shape[1]
    return replace(layer, A=A, B=B[:1].float() * 0)


def with_more_terms(layer: LayerUpdate, r: int) -> LayerUpdate:
    """The same update with r terms: those that are new start as a fresh adapter does, A random and B zero."""
    more = r - layer.r
    if more <= 0:
        return layer
    A = torch.randn(more, *layer.A.shape[1:]) / layer.A.shape[1]
    return replace(
        layer,
        A=torch.cat([layer.A.float(), A]),
        B=torch.cat([layer.B.float(), torch.zeros(more, *layer.B.shape[1:])]),
    )


# -- flags that contradict the file ------------------------------------------------------------------------------------


def check_components(source: str, components: Components, denoiser: str, train_text_encoder: bool) -> None:
    encoders = [name for name in components if name.startswith("text_encoder")]
    if denoiser not in components:
        raise TrainingError(
            f"--init_adapter {source} has weights for {', '.join(components)}; expected some for the {denoiser}, which "
            "is always trained."
        )
    if encoders and not train_text_encoder:
        raise TrainingError(
            f"--init_adapter {source} has weights for {', '.join(encoders)}, which are not trained: add "
            "--train_text_encoder, or remove them from the file."
        )
    if train_text_encoder and not encoders:
        raise TrainingError(
            f"--train_text_encoder contradicts --init_adapter {source}, which has weights for {', '.join(components)} "
            "alone: drop it."
        )


def check_scales(source: str, components: Components, asked: Mapping[str, Any]) -> None:
    for name, (config, _) in components.items():
        for flag, field in SCALES.items():
            own = getattr(config, field)
            others = sorted(set(config.alpha_pattern.values())) if field == "alpha" else []
            if asked.get(flag) is not None and (own != asked[flag] or others):
                shown = ", ".join(f"{value:g}" for value in (own, *others)) if field == "alpha" else own
                raise TrainingError(
                    f"--{flag} {asked[flag]} contradicts --init_adapter {source}, whose {field} is {shown} in the "
                    f"{name}: drop it, as the strength is the file's."
                )


def check_targets(
    source: str, components: Components, denoiser: str, models: Mapping[str, nn.Module], asked: Mapping[str, Any]
) -> None:
    for flag, part in TARGETS.items():
        if asked.get(flag) is None:
            continue
        for name, (_, weights) in components.items():
            if (name == denoiser) != (part == "denoiser"):
                continue
            keys = (key.removesuffix(".krona_A") for key in plain_keys(weights) if key.endswith(".krona_A"))
            own = {key.removeprefix(CLIP) for key in keys}
            wanted = {key.removeprefix(CLIP) for key in matched(models[name], asked[flag])}
            if own != wanted:
                example = min(own ^ wanted)
                which = "is" if example in own else "is not"
                raise TrainingError(
                    f"--{flag} matches {len(wanted)} layers of the {name}, and contradicts --init_adapter {source}, "
                    f"which has {len(own)} ({example} {which} among them): drop it."
                )
