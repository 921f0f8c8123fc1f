# SPDX-License-Identifier: Apache-2.0
"""Which implementation computes a Kronecker product, and why another one cannot."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from importlib import metadata

import torch

from .._compat import sees_single_ops
from ..choices import BACKENDS, Backend
from ..errors import BackendError

# "torch" also on GPUs: the Triton kernels have not been timed on one yet (docs/performance.md).
DEFAULT = os.environ.get("PEFT_KRONA_BACKEND") or "torch"

OLDEST_TRITON = (3, 4)  # 3.0's interpreter does not run the kernels; versions between were not tried
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_announced: set[str] = set()
logger = logging.getLogger(__name__)


def _triton_version() -> tuple[int, ...] | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return tuple(int(part) for part in metadata.version("triton").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):  # a build of another name, such as pytorch-triton
        return OLDEST_TRITON


_TRITON = _triton_version()  # now, not when asked for: torch.compile would trace into the search for it


def choose_backend(asked: Backend | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """What is asked for, else what PEFT_KRONA_BACKEND said at import, else "torch".

    Raises:
        BackendError: if that is unknown or cannot compute in `dtype` on `device`. There is no silent second choice.
    """
    backend = asked or DEFAULT
    # A graph must not depend on what was announced: the first eager call after it would compile it again.
    if backend == "torch" and (torch.compiler.is_compiling() or backend in _announced):
        return "torch"
    if backend not in BACKENDS:
        source = f"backend={backend!r}" if asked else f"PEFT_KRONA_BACKEND={backend}"
        auto = ' "auto" was taken out: leave it away, and the rule in ops/plan.py decides.' if backend == "auto" else ""
        raise BackendError(f"{source} is unknown; expected one of {BACKENDS}.{auto}")
    if backend == "triton" and (reason := why_not_triton(device, dtype)) is not None:
        source = "backend='triton'" if asked else "PEFT_KRONA_BACKEND=triton"
        raise BackendError(f"{source} was asked for, but {reason}. backend='torch' works everywhere.")
    if not torch.compiler.is_compiling() and backend not in _announced:
        _announced.add(backend)
        logger.info("Kronecker products on %s in %s: backend %r.", device.type, dtype, backend)
    return backend


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the kernels from computing in `dtype` on `device`; None if nothing does."""
    if _TRITON is None:
        return "the package triton is not installed (pip install 'peft-krona[triton]')"
    if _TRITON < OLDEST_TRITON:
        oldest, found = (".".join(map(str, version)) for version in (OLDEST_TRITON, _TRITON))
        return f"the kernels need triton {oldest} or newer, and {found} is installed"
    if dtype not in _DTYPES:
        return f"the kernels compute in {', '.join(map(str, _DTYPES))}, not in {dtype}"
    if device.type != "cuda" and not _INTERPRETED:
        return f"the tensors are on {device.type!r} and the kernels need a CUDA device"
    if device.type == "cuda" and (reason := _why_not_gpu(device)) is not None:
        return reason
    if not torch.compiler.is_compiling() and sees_single_ops():
        return "torch.func transforms, forward-mode differentiation and torch.jit.trace cannot look into the kernels"
    return None


@torch.compiler.assume_constant_result  # torch.compile takes what this returns and does not look into it
def _why_not_gpu(device: torch.device) -> str | None:
    return _asked_gpu(device)


@functools.cache  # asked for in every call. Not above: torch.compile looks through a cache, past the mark
def _asked_gpu(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0 (Ampere) or newer"
    return None
