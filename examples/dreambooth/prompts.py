# SPDX-License-Identifier: Apache-2.0
"""Prompts as the denoiser wants them: encoded once, or as token ids for text encoders that are trained too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from . import TrainingError
from .disk_cache import DiskCache, Stored
from .families.base import Family, Text


def say_cut(encoders: Sequence[tuple[Any, int]], prompts: Iterable[str], say: Callable[[str], None]) -> None:
    """Say which prompts are longer than what the text encoders read, and what of the first is lost.

    `encoders`: the tokenizer and the number of tokens that its encoder is given, special ones included.

    Raises:
        TrainingError: if an encoder has no room for any prompt.
    """
    least = min(limit for _, limit in encoders)
    if least < 1:
        raise TrainingError(
            f"--max_sequence_length: the text encoder's template and a prompt of one token need {1 - least} more; "
            "raise it, or leave it out."
        )
    cut, partly = [], 0
    for prompt in dict.fromkeys(prompts):
        found = [lost(tokenizer, limit, prompt) for tokenizer, limit in encoders]
        if all(found):
            cut.append((prompt, *min(found, key=lambda f: len(f[0]))))
        partly += any(found) and not all(found)
    if cut:
        prompt, tail, length, limit = cut[0]
        say(
            f"warning: {len(cut)} prompts are longer than what the text encoder reads, and are cut: shorten them; the "
            f"first, {prompt[:40]!r}... with {length} tokens of at most {limit}, loses its end {tail!r}."
        )
    if partly:
        say(f"note: one text encoder reads {least} tokens only and cuts {partly} prompts; another reads them whole.")


def lost(tokenizer: Any, limit: int, prompt: str) -> tuple[str, int, int] | None:
    """(the end of the prompt that is cut, its tokens, the limit); None if nothing is."""
    ids = tokenizer(prompt, truncation=False).input_ids
    if len(ids) <= limit:
        return None
    kept = limit - (ids[-1] == tokenizer.eos_token_id)  # the end mark stays
    return tokenizer.decode(ids[kept:], skip_special_tokens=True).strip(), len(ids), limit


class TextEmbeddings:
    """Prompts for the denoiser: encoded once by frozen text encoders and kept, as token ids for trained ones."""

    def __init__(self, family: Family, trained: bool, device: torch.device, disk: DiskCache | None = None):
        """`disk`: where they are kept, if not in memory."""
        self.family, self.trained, self.device, self.disk = family, trained, device, disk
        self.known: dict[str, Text | Stored] = {}

    @torch.no_grad()
    def precompute(self, prompts: Iterable[str]) -> None:
        if self.disk is not None:
            self.known |= {prompt: found for prompt in set(prompts) if (found := self.disk.get(prompt))}
        todo = sorted(set(prompts) - set(self.known))
        for start in range(0, len(todo), self.family.prompts_at_once):
            part = todo[start : start + self.family.prompts_at_once]
            for prompt, text in zip(part, self.family.encode_prompt(part), strict=True):
                if self.disk is not None:
                    self.known[prompt] = self.disk.put(text, prompt)
                else:
                    self.known[prompt] = {name: value.cpu() for name, value in text.items()}

    def __call__(self, prompts: list[str]) -> Text:
        tokens = self.family.tokens(prompts, self.device) if self.trained else {}
        if not self.known:  # all encoders are trained
            return tokens
        found = [self.known[prompt] for prompt in prompts]
        batch = self.family.collate([text.read() if isinstance(text, Stored) else text for text in found])
        return tokens | {name: to_device(value, self.device) for name, value in batch.items()}


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors, and lists of them."""
    if isinstance(value, list):
        return [to_device(v, device) for v in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value
