# SPDX-License-Identifier: Apache-2.0
"""Kronecker adapters for PEFT. Importing this package registers the tuner type "KRONA" with PEFT.

>>> import torch, peft_krona
>>> from peft import get_peft_model
>>> model = torch.nn.Sequential(torch.nn.Linear(128, 256))
>>> model = get_peft_model(model, peft_krona.KronAConfig(target_modules=["0"]))
>>> model.print_trainable_parameters()
trainable params: 384 || all params: 33,408 || trainable%: 1.1494
KronA adapts 1 of 1 Linear layers, 99.2% of the weights
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _command_line

_command_line.begin()  # where the command line asks for help, it ends here, before torch is imported

from . import _register  # noqa: E402

_register.add_enum_member()

from . import _diffusers, hotswap  # noqa: E402  (needs PeftType.KRONA)
from ._version import __version__  # noqa: E402, F401
from .config import KronAConfig  # noqa: E402  (needs PeftType.KRONA)
from .layers import KronALayer  # noqa: E402
from .merge import merged  # noqa: E402
from .model import KronAModel  # noqa: E402
from .ops import kron_linear  # noqa: E402
from .param_groups import krona_param_groups, warn_that_it_is_for_lora  # noqa: E402
from .share import line as _share_line  # noqa: E402

_register.register(KronAConfig, KronAModel, KronALayer)
_register.add_to_print(_share_line)
_register.add_to_optimizers(warn_that_it_is_for_lora)
_register.add_to_model_card(KronAConfig)
_register.register_hotswap(KronAConfig, hotswap.swap, hotswap.prepare, hotswap.make_scalings_tensors)
_diffusers.register()

if TYPE_CHECKING:
    from .pipelines import add_krona, load_krona_weights, save_krona_weights
    from .suggest import suggest_factors

__all__ = [
    "KronAConfig",
    "KronALayer",
    "KronAModel",
    "add_krona",
    "kron_linear",
    "krona_param_groups",
    "load_krona_weights",
    "merged",
    "save_krona_weights",
    "suggest_factors",
]
# {name: its module}, imported when it is asked for (PEP 562)
_LAZY = {name: "pipelines" for name in ("add_krona", "load_krona_weights", "save_krona_weights")}
_LAZY["suggest_factors"] = "suggest"
_LAZY |= {name: "" for name in ("convert", "inspection", "pipelines")}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_LAZY[name] or name}")
    return getattr(module, name) if _LAZY[name] else module


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
