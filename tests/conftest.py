# SPDX-License-Identifier: Apache-2.0
"""Shared set-up: offline, one thread per worker, an own cache folder, and uninitialised memory made visible."""

import os
import signal
import sys
import threading

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))  # more in tests/numerics.py only
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, which is inherited
_assert_close = torch.testing.assert_close


def _assert_close_in_float64(actual, expected, *, rtol=None, atol=None, **kwargs):
    """torch.testing.assert_close for float64, and for what should be equal; nothing else has a fixed tolerance.

    How far apart two fp32 results lie depends on the machine's BLAS and number of threads. They are judged by float64
    with a bound that follows from the dtype and the magnitudes (tests/rounding.py), or computed in float64 themselves
    (the fixture `float64`).
    """
    __tracebackhide__ = True
    given = [t for side in (actual, expected) for t in (side if isinstance(side, (tuple, list)) else [side])]
    floats = [t for t in given if isinstance(t, float) or (isinstance(t, torch.Tensor) and not is_exact(t))]
    if (rtol, atol) != (0, 0):
        assert max(rtol or 0, atol or 0) <= 1e-7, "a fixed tolerance: see tests/rounding.py"
        wrong = {t.dtype for t in floats if isinstance(t, torch.Tensor)} - {torch.float64, torch.complex128}
        assert not wrong, f"compared with a fixed tolerance in {wrong}: see tests/rounding.py"
    _assert_close(actual, expected, rtol=rtol, atol=atol, **kwargs)


def is_exact(t: torch.Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex())


torch.testing.assert_close = _assert_close_in_float64


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def float64():
    """New tensors and layers are float64: what is compared is then no matter of rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """Fixed seed; torch.empty gives NaN, so that memory that nothing wrote shows up as NaN."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_accelerator_left_behind():
    """accelerate keeps the first Accelerator's settings for the process: the next test may want others."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(True)
        state.PartialState._reset_state()
