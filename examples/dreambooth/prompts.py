# SPDX-License-Identifier: Apache-2.0
"""The trained module: a UNet with its text encoders; and prompts as it wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def is_sdxl(pipe: Any) -> bool:
    return getattr(pipe, "text_encoder_2", None) is not None


def text_encoders(pipe: Any) -> dict[str, nn.Module]:
    """By component name, in the order in which the pipeline concatenates their outputs."""
    names = ("text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def windows(pipe: Any) -> list[tuple[Any, int]]:
    """(tokenizer, tokens that its encoder reads) of the text encoders."""
    found = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    return [(tokenizer, tokenizer.model_max_length) for tokenizer in found if tokenizer is not None]


def tokenize(pipe: Any, prompts: list[str]) -> list[torch.Tensor]:
    """Token ids, one tensor per text encoder."""
    tokenizers = [pipe.tokenizer] + ([pipe.tokenizer_2] if is_sdxl(pipe) else [])
    return [
        t(prompts, padding="max_length", max_length=t.model_max_length, truncation=True, return_tensors="pt").input_ids
        for t in tokenizers
    ]


def say_cut(encoders: Iterable[tuple[Any, int]], prompts: Iterable[str], say: Callable[[str], None]) -> None:
    """Say which prompts are longer than what the text encoders read, and what of the first is lost.

    `encoders`: the tokenizer and the number of tokens that its encoder is given, special ones included.
    """
    lost: dict[str, str] = {}
    for tokenizer, limit in encoders:
        for prompt in dict.fromkeys(prompts):
            ids = tokenizer(prompt, truncation=False).input_ids
            if len(ids) > limit:
                tail = tokenizer.decode(ids[limit - 1 :], skip_special_tokens=True).strip()
                lost[prompt] = max(tail, lost.get(prompt, ""), key=len)
    if lost:
        first = next(iter(lost))
        say(
            f"warning: {len(lost)} prompts are longer than what the text encoder reads, and are cut; the first, "
            f"{first[:40]!r}..., loses its end {lost[first]!r}."
        )


class Denoiser(nn.Module):
    """UNet and text encoders as one module, so that one wrapper (DDP, DeepSpeed, ...) sees all that is trained."""

    def __init__(self, pipe: Any):
        super().__init__()
        self.unet = pipe.unet
        self.encoder_names = list(text_encoders(pipe))
        self.encoders = nn.ModuleList(text_encoders(pipe).values())
        self.sdxl = is_sdxl(pipe)
        # SDXL pipelines can define that the empty prompt is all zeros instead of its encoding
        self.zero_if_empty = self.sdxl and bool(pipe.config.get("force_zeros_for_empty_prompt"))

    def encode(self, ids: list[torch.Tensor], empty: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the UNet attends to (`hidden`) and, for SDXL, the pooled embedding. `empty` marks empty prompts."""
        if not self.sdxl:
            return {"hidden": self.encoders[0](ids[0])[0]}
        outputs = [encoder(i, output_hidden_states=True) for encoder, i in zip(self.encoders, ids, strict=True)]
        hidden, pooled = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[-1][0]
        if self.zero_if_empty:
            hidden, pooled = hidden.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return {"hidden": hidden, "pooled": pooled}

    def by_component(self, state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """This module's whole state dict as {component of the pipeline: its state dict}."""
        names = {"unet.": "unet"} | {f"encoders.{i}.": name for i, name in enumerate(self.encoder_names)}
        return {
            name: {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            for start, name in names.items()
        }

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: dict[str, Any],
        time_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The UNet's prediction. `text`: either {ids, empty}, to be encoded here, or what `encode` returned."""
        if "ids" in text:
            text = self.encode(text["ids"], text["empty"])
        hidden, added = text["hidden"].to(noisy.dtype), None
        if self.sdxl:
            added = {"text_embeds": text["pooled"].to(noisy.dtype), "time_ids": time_ids}
        return self.unet(noisy, timesteps, hidden, added_cond_kwargs=added, return_dict=False)[0]


class TextEmbeddings:
    """Prompts for the denoiser: encoded once and kept if the text encoders are frozen, else as token ids."""

    def __init__(self, pipe: Any, denoiser: Denoiser, trained: bool, device: torch.device):
        self.pipe, self.denoiser, self.trained, self.device = pipe, denoiser, trained, device
        self.known: dict[str, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def precompute(self, prompts: Iterable[str], batch: int = 16) -> None:
        todo = sorted(set(prompts) - set(self.known))
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            encoded = self.denoiser.encode(**self.tokens(part))
            for i, prompt in enumerate(part):
                self.known[prompt] = {name: value[i].cpu() for name, value in encoded.items()}

    def tokens(self, prompts: list[str]) -> dict[str, Any]:
        device = next(self.denoiser.encoders.parameters()).device if not self.trained else self.device
        empty = torch.tensor([prompt == "" for prompt in prompts], device=device)
        return {"ids": [ids.to(device) for ids in tokenize(self.pipe, prompts)], "empty": empty}

    def __call__(self, prompts: list[str]) -> dict[str, Any]:
        if self.trained:
            return self.tokens(prompts)
        found = [self.known[prompt] for prompt in prompts]
        return {name: torch.stack([f[name] for f in found]).to(self.device) for name in found[0]}


def time_ids(batch: dict[str, Any], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """SDXL's micro-conditioning: original size, crop corner, target size."""
    columns = (batch["original_size"], batch["crop"], batch["target_size"])
    rows = [(*o, *c, *t) for o, c, t in zip(*columns, strict=True)]
    return torch.tensor(rows, device=device, dtype=dtype)
