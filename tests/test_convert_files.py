# SPDX-License-Identifier: Apache-2.0
"""Bad input: foreign, truncated, corrupted, mixed and hostile files give an error that names file and reason."""

import json
import pickle
import random

import pytest
import torch
from safetensors.torch import save, save_file

from peft_krona.convert import AdapterFile, LayerUpdate, export, read_adapter
from peft_krona.convert.safetensors_io import read_safetensors
from peft_krona.errors import FormatError, KronAError

BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn1"
FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1"


def lokr_file():
    tensors = {}
    for k in ("to_q", "to_k", "to_v"):
        tensors |= {f"{FLAT}_{k}.lokr_w1": torch.randn(4, 2), f"{FLAT}_{k}.lokr_w2": torch.randn(8, 16)}
        tensors[f"{FLAT}_{k}.alpha"] = torch.tensor(1.0)
    return tensors


def lora_file():
    tensors = {}
    for k in ("to_q", "to_k", "to_v"):
        tensors |= {
            f"{FLAT}_{k}.lora_down.weight": torch.randn(4, 32),
            f"{FLAT}_{k}.lora_up.weight": torch.randn(32, 4),
        }
        tensors[f"{FLAT}_{k}.alpha"] = torch.tensor(4.0)
    return tensors


def released_file():
    tensors = {}
    for k in ("to_q", "to_k", "to_v", "to_out"):
        stem = f"unet.{BLOCK}.processor.{k}_lora"
        tensors |= {f"{stem}.down.weight": torch.randn(4, 8), f"{stem}.up.weight": torch.randn(5, 10)}
    return tensors


FILES = {"lokr": lokr_file, "lora": lora_file, "released": released_file}


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape, dtype="F32", offsets=None):
    n = torch.Size(shape).numel() * 4
    return {"dtype": dtype, "shape": list(shape), "data_offsets": offsets or [0, n]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a.lokr_w1": entry((2**40, 2**40), offsets=[0, 4])}, b"1234", "declares shape .* but has 4 bytes"),
        ({"a.lokr_w1": entry((4,))}, b"1234", "should end at byte 16 of the data, but the file has 4 bytes"),
        ({"a.lokr_w1": entry((-1,), offsets=[0, 4])}, b"1234", "entry for 'a.lokr_w1' is not a tensor's"),
        ({"a.lokr_w1": entry((1,), offsets=[4, 0])}, b"1234", "is not a tensor's"),
        ({"a.lokr_w1": entry((1,), dtype="I64")}, b"12345678", "'a.lokr_w1' has dtype I64"),
        ({"a.lokr_w1": entry((1,), dtype="F8_E4M3")}, b"1", "has dtype F8_E4M3"),
        ({"a.lokr_w1": entry((True,))}, b"1234", "is not a tensor's"),
        ({"a.lokr_w1": {"dtype": "F32"}}, b"", "is not a tensor's"),
        ({"a.lokr_w1": [1, 2]}, b"", "is not a tensor's"),
        (b'{"a": {}, "a": {}}', b"", "has the key 'a' twice"),
        (b'{"a": ', b"", "not valid JSON"),
        (b"{" + b"\xff" * 20, b"", "not valid JSON"),
        (b'{"a":' * 5000, b"", "not valid JSON"),
        ({"__metadata__": {"a": 1}, "a.lokr_w1": entry((1,))}, b"1234", "not a valid safetensors file"),
    ],
)  # fmt: skip
def test_hostile_headers(tmp_path, header, data, message):
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(FormatError, match=message) as error:
        read_adapter(path)
    assert "x.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"1234567", "truncated"),
        ((10**15).to_bytes(8, "little") + b"{}", "header that the first"),
        (pickle.dumps({"a": 1}), "a Python pickle.*can run code"),
        (b"PK\x03\x04" + b"0" * 50, "a zip archive, as torch.save writes"),
        (b"GGUF" + b"0" * 50, "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
    ],
)
def test_files_that_are_something_else(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_adapter(path)


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    for name in ("x.safetensors", "pytorch_lora_weights.bin", "x.pt"):
        path = tmp_path / name
        torch.save({"a.lokr_w1": Bomb()}, path)
        with pytest.raises(FormatError, match=r"not opened|pickles can run code"):
            read_adapter(path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "adapter_config.json").write_text('{"peft_type": "KRONA"}')
    torch.save({"a": Bomb()}, tmp_path / "folder" / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"adapter_model\.bin.*not opened"):
        read_adapter(tmp_path / "folder")
    assert not (tmp_path / "exploded").exists()


def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path):
    """0x80 is both a pickle's first byte and the low byte of a header of 128 or 640 bytes."""
    for length in (128, 640, 0x3C3C):
        header = {"a.x": entry((1,)), "__metadata__": {"pad": ""}}
        header["__metadata__"]["pad"] = "x" * (length - len(json.dumps(header)))
        path = write(tmp_path / "x.safetensors", header, b"\0\0\0\0")
        assert read_safetensors(path)[0]["a.x"].tolist() == [0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path, value):
    tensors = lokr_file()
    tensors[f"{FLAT}_to_k.lokr_w2"][3, 4] = value
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=r"to_k\.lokr_w2' holds NaN or infinite"):
        read_adapter(tmp_path / "x.safetensors")


def test_folders_without_or_with_too_many_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_adapter(tmp_path / "missing")
    with pytest.raises(FormatError, match="no safetensors file"):
        read_adapter(tmp_path)
    for name in ("a", "b"):
        save_file(lokr_file(), tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match=r"a\.safetensors, b\.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert len(read_adapter(tmp_path)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.clear(), "peft_type=None cannot be read"),
        (lambda c: c.update(a_out=2), r"config gives this layer .* = \(1, 2, 2\)"),
        (lambda c: c.update(r=2), r"config gives this layer .* = \(2, 4, 2\)"),
        (lambda c: c.update(layout="banana"), "layout"),
        (lambda c: c.update(alpha="NaN"), "alpha"),
        (lambda c: c.update(peft_type="LORA"), "does not belong here"),
        (lambda c: c.update(rank_pattern={"(": 1}), "regex"),
        (lambda c: c.update(factor_pattern=[1, 2]), "factor_pattern"),
    ],
)
def test_configs_that_do_not_fit_the_weights(tmp_path, change, message):
    layer = LayerUpdate("unet", f"{BLOCK}.to_q", torch.randn(1, 4, 2), torch.randn(1, 8, 16))
    export(AdapterFile((layer,)), tmp_path / "x", "peft")
    path = tmp_path / "x" / "unet" / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(KronAError, match=message):
        read_adapter(tmp_path / "x")


def test_weights_without_their_config(tmp_path):
    layer = LayerUpdate("unet", f"{BLOCK}.to_q", torch.randn(1, 4, 2), torch.randn(1, 8, 16))
    export(AdapterFile((layer,)), tmp_path / "x", "peft")
    weights = tmp_path / "x" / "unet" / "adapter_model.safetensors"
    assert read_adapter(weights).layers[0].name == layer.name
    (weights.parent / "adapter_config.json").write_text("[]")
    with pytest.raises(FormatError, match="expected a JSON object"):
        read_adapter(weights)
    (weights.parent / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match="no config, without which layout and scale are unknown"):
        read_adapter(weights)


def test_a_small_file_cannot_ask_for_a_huge_weight(tmp_path):
    tensors = {
        f"{FLAT}_to_q.lora_down.weight": torch.ones(1, 2**17),
        f"{FLAT}_to_q.lora_up.weight": torch.ones(2**17, 1),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(KronAError, match="larger than any layer"):
        read_adapter(tmp_path / "x.safetensors")


# -- fuzzing -----------------------------------------------------------------------------------------------------------
# Changes of structure have to be noticed; changes of the data alone cannot be, and have to leave the rest as it was.


def parsed(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def assembled(header, data):
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def cut(rng, raw):
    return raw[: rng.randrange(len(raw))]


def grown(rng, raw):
    return raw + bytes(rng.randrange(1, 64))


def flipped_in_header(rng, raw):
    length = int.from_bytes(raw[:8], "little")
    where = rng.randrange(8 + length)
    return raw[:where] + bytes([raw[where] ^ (1 << rng.randrange(8))]) + raw[where + 1 :]


def noise(rng, raw):
    return bytes(rng.randrange(256) for _ in range(rng.randrange(200)))


def reshaped(rng, raw):
    header, data = parsed(raw)
    key = rng.choice([key for key, value in header.items() if len(value["shape"]) == 2])
    rows, columns = header[key]["shape"]
    header[key]["shape"] = rng.choice(
        [[rows * columns], [rows, columns, 1, 1, 1, 1], [rows + 1, columns], [rows, -columns], [0, columns]]
    )
    return assembled(header, data)


def retyped(rng, raw):
    header, data = parsed(raw)
    key = rng.choice(list(header))
    header[key]["dtype"] = rng.choice(["I32", "F16", "F64", "BOOL", "F8_E5M2", "banana", "", "U8"])
    return assembled(header, data)


def moved(rng, raw):
    header, data = parsed(raw)
    key = rng.choice(list(header))
    begin, end = header[key]["data_offsets"]
    shift = rng.choice([4, -4, 10**9, 2**62])
    header[key]["data_offsets"] = [begin + shift, end + shift]
    return assembled(header, data)


def halved(rng, raw):
    """One half of a layer is missing."""
    from safetensors.torch import load

    tensors = load(raw)
    del tensors[rng.choice([key for key in tensors if not key.endswith("alpha")])]
    return save(tensors)


def renamed(rng, raw):
    from safetensors.torch import load

    tensors = load(raw)
    key = rng.choice([key for key in tensors if not key.endswith("alpha")])
    where = rng.randrange(len(key))
    tensors[key[:where] + rng.choice("x.#_9") + key[where + 1 :]] = tensors.pop(key)
    return save(tensors)


def mixed(rng, raw):
    """Keys of a second format; released files have none of the others' marks, so any of the three will do."""
    from safetensors.torch import load

    tensors = load(raw)
    kinds = [kind for kind, make in FILES.items() if make().keys().isdisjoint(tensors)]
    other = FILES[rng.choice(kinds)]()
    for key in rng.sample(sorted(other), 2):
        tensors[key] = other[key]
    return save(tensors)


MUTATIONS = [cut, grown, flipped_in_header, noise, reshaped, retyped, moved, halved, renamed, mixed]


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutated_files_are_refused_or_read_as_before(kind, mutation, tmp_path):
    """20 files each: 600 in all."""
    original = FILES[kind]()
    raw = save(original)
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    wanted = {layer.name: layer for layer in read_adapter(path)}
    rng = random.Random(f"{kind} {mutation.__name__}")
    refused = 0
    for _ in range(20):
        changed = mutation(rng, raw)
        if changed == raw:
            continue
        path.write_bytes(changed)
        try:
            adapter = read_adapter(path)
        except KronAError as error:
            refused += 1
            assert len(str(error)) > 30
            continue
        # What is accepted has every layer with its values, but for a name that was changed to another valid one.
        assert len(adapter) == len(wanted)
        different = [layer for layer in adapter if layer.name not in wanted]
        assert len(different) <= 1 and (not different or mutation in (flipped_in_header, renamed))
        for layer in adapter:
            if layer.name in wanted:
                assert torch.equal(layer.A, wanted[layer.name].A) and torch.equal(layer.B, wanted[layer.name].B)
    assert refused >= 12


ODD_VALUES = [
    None,
    -1,
    0,
    1.5,
    float("nan"),
    True,
    "x",
    "(",
    [],
    [1],
    {},
    {"a": 1},
    {"(": 1},
    {"to_q": "x"},
    {"to_q": -1},
]


@pytest.mark.parametrize("kind", ["KRONA", "LOKR", "LORA"])
def test_mutated_configs_are_refused_or_read(kind, tmp_path):
    """Every entry of the config with every odd value."""
    from dataclasses import fields

    from peft import LoKrConfig, LoraConfig

    from peft_krona import KronAConfig

    q = f"base_model.model.{BLOCK}.to_q"
    config, tensors = {
        "KRONA": (
            KronAConfig(a_out=4, a_in=2),
            {f"{q}.krona_A": torch.ones(1, 4, 2), f"{q}.krona_B": torch.ones(1, 8, 16)},
        ),
        "LOKR": (LoKrConfig(r=2, alpha=2), {f"{q}.lokr_w1": torch.ones(4, 2), f"{q}.lokr_w2": torch.ones(8, 16)}),
        "LORA": (LoraConfig(r=2), {f"{q}.lora_A.weight": torch.ones(2, 8), f"{q}.lora_B.weight": torch.ones(8, 2)}),
    }[kind]
    config.save_pretrained(str(tmp_path))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    path = tmp_path / "adapter_config.json"
    original = json.loads(path.read_text())
    assert read_adapter(tmp_path).layers[0].module == f"{BLOCK}.to_q"
    for name in {field.name for field in fields(config)} | set(original):
        for value in ODD_VALUES:
            path.write_text(json.dumps(original | {name: value}))
            try:
                assert len(read_adapter(tmp_path)) == 1
            except KronAError as error:
                assert len(str(error)) > 30


@pytest.mark.parametrize("kind", FILES)
def test_flipped_data_changes_values_only(kind, tmp_path):
    raw = save(FILES[kind]())
    start = 8 + int.from_bytes(raw[:8], "little")
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    wanted = [(layer.name, layer.shape) for layer in read_adapter(path)]
    rng = random.Random(kind)
    for _ in range(30):
        where = rng.randrange(start, len(raw))
        path.write_bytes(raw[:where] + bytes([raw[where] ^ (1 << rng.randrange(8))]) + raw[where + 1 :])
        try:
            assert [(layer.name, layer.shape) for layer in read_adapter(path)] == wanted
        except FormatError as error:
            assert "NaN or infinite" in str(error) or "positive number" in str(error)
