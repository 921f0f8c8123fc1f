# SPDX-License-Identifier: Apache-2.0
"""Models whose weights accelerate or diffusers keeps elsewhere until they are needed."""

import pytest
import torch
from adapted import config
from peft import get_peft_model
from torch import nn

import peft_krona

CPU = torch.device("cpu")


class Model(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.conv = nn.Embedding(9, 16), nn.Linear(16, 32), nn.Conv1d(32, 8, 3)

    def forward(self, tokens):
        return self.conv(self.linear(self.embedding(tokens)).mT)


def adapted_model():
    torch.manual_seed(0)
    settings = config(["embedding", "linear", "conv"], a_in=4)
    return get_peft_model(Model(), settings).eval(), settings, torch.randint(0, 9, (2, 5))


def test_factors_come_back_from_offloading():
    """accelerate brings a module's tensors when the module is called; the factors' dicts are never called."""
    from accelerate import cpu_offload

    model, settings, tokens = adapted_model()
    model.add_adapter("other", settings)
    want = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        want[name] = model(tokens).detach()
    cpu_offload(model, execution_device=CPU)
    for name in ("other", "default"):
        model.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(model(tokens), want[name])
    assert all(parameter.is_meta for parameter in model.parameters())


def test_factors_come_back_from_group_offloading(tmp_path):
    """diffusers does the same with hooks of its own."""
    hooks = pytest.importorskip("diffusers.hooks")

    model, _, tokens = adapted_model()
    with torch.no_grad():
        want = model(tokens)
        hooks.apply_group_offloading(
            model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
        )
        assert torch.equal(model(tokens), want)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_adapter, safe", "merge_and_unload, safe", "merged, safe"])
@pytest.mark.usefixtures("float64")
def test_merging_an_offloaded_model(how):
    from accelerate import cpu_offload

    model, _, tokens = adapted_model()
    with torch.no_grad():
        unmerged = model(tokens)
    cpu_offload(model, execution_device=CPU)
    safe = how.endswith("safe")
    with torch.no_grad():
        if how.startswith("merged"):
            with peft_krona.merged(model, safe_merge=safe):
                torch.testing.assert_close(model(tokens), unmerged)
            assert torch.equal(model(tokens), unmerged)
        elif how.startswith("merge_adapter"):
            model.merge_adapter(safe_merge=safe)
            torch.testing.assert_close(model(tokens), unmerged)
        else:
            torch.testing.assert_close(model.merge_and_unload(safe_merge=safe)(tokens), unmerged)
