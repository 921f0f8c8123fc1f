# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run from end to end on tiny cases, and what they say is so. Speeds are not tested."""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import cases, launches, layers, measure, providers, report, run, unets

ROOT = Path(__file__).parents[1]
TINY = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
}
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
UNET = ["--only", "plain", "--providers", "PEFT LoRA r=4", "KronA (8,2)"]


@pytest.fixture(autouse=True)
def _tiny_cases(monkeypatch):
    monkeypatch.setattr(cases, "FACTORS", ((8, 2),))
    square, other = cases.LinearCase("square", 5, 32, 32), cases.LinearCase("other", 3, 32, 64)
    monkeypatch.setattr(cases, "LAYERS", (square, other))
    monkeypatch.setattr(cases, "POINT", {"tokens": 4, "width": 64, "r": 1, "adapters": 1})
    monkeypatch.setattr(cases, "SCALING", {"tokens": (4, 8), "r": (2,), "adapters": (2,)})
    monkeypatch.setattr(cases, "UNETS", {"plain": (TINY, (8, 8)), "with text_time": (TINY | ADDED, (8, 8))})
    monkeypatch.setattr(run, "copy_bandwidth", lambda device: 1e10)


def measured(path, *arguments, status=0):
    """The result file of a run with few repetitions."""
    arguments = ["--device", "cpu", "--repetitions", "2", "--out", str(path), *map(str, arguments)]
    assert run.main(arguments) == status
    assert list(path.parent.glob("*.tmp")) == []
    return json.loads(path.read_text(encoding="utf-8"))


def table(path, capsys):
    capsys.readouterr()
    report.main([str(path)])
    return capsys.readouterr().out


# -- every suite, from end to end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer(tmp_path, capsys, dtype):
    result = measured(tmp_path / "r.json", "--suite", "layer", "--dtype", dtype)
    names = [name for name in providers.PROVIDERS if providers.backend_of(name) == "torch"]
    assert [row["provider"] for row in result["rows"]] == 2 * names
    assert result["complete"] and result["dtype"] == dtype and result["lycoris_kernels"] == "torch"
    for row in result["rows"]:
        assert not {"wrong", "failed"} & set(row), row
        assert row["training"]["p20"] <= row["training"]["p50"] <= row["training"]["p80"] and row["peak_bytes"] > 0
        assert ("over_floor" in row["training"]) == (row["provider"] != "frozen")
    text = table(tmp_path / "r.json", capsys)
    assert all(text.count(f"| {name} |") == 2 for name in names[1:])
    assert "**other**: 3 tokens, 32 to 64, factors (8,2)" in text
    assert "LyCORIS computes its bypass mode with: torch" in text


def test_scaling(tmp_path, capsys):
    result = measured(tmp_path / "r.json", "--suite", "scaling")
    assert [row["provider"] for row in result["rows"]] == 4 * ["frozen", "PEFT LoRA 4 r", "KronA"]
    assert {row["tokens"] for row in result["rows"]} == {4, 8}
    assert table(tmp_path / "r.json", capsys).count("| KronA |") == 4


@pytest.mark.parametrize("suite", ["unet", "inference"])
def test_unets(tmp_path, capsys, suite):
    unet_name = "plain" if suite == "unet" else "with text_time"
    arguments = ["--suite", suite, "--only", unet_name, "--batch", 1, 2]
    if suite == "unet":
        arguments += ["--gradient-checkpointing", "off", "on"]
    result = measured(tmp_path / "r.json", *arguments)
    names = ["frozen", "PEFT LoRA r=4", "PEFT LoKr", "KronA (8,2)"]
    names += ["KronA (8,2), merged"] if suite == "inference" else []
    seen = [(r["unet"], r["provider"], r["batch"], r["gradient_checkpointing"]) for r in result["rows"]]
    checkpointing = [False, True] if suite == "unet" else [False]
    assert seen == [
        (unet_name, name, batch, on)
        for name in names
        for batch in (1, 2)
        for on in checkpointing
    ]  # fmt: skip
    kind = "training" if suite == "unet" else "forward"
    for row in result["rows"]:
        assert row["compiled"] is False and (row["trainable"] > 0) == (row["provider"] != "frozen")
        assert row[kind]["timed"] == 2 and row[kind]["over_frozen"] > 0 and row[kind]["over_lora"] > 0
    if suite == "unet":  # recomputing instead of keeping
        peak = {key: row["peak_bytes"] for key, row in zip(seen, result["rows"], strict=True)}
        assert peak["plain", "KronA (8,2)", 2, True] < peak["plain", "KronA (8,2)", 2, False]
    text = table(tmp_path / "r.json", capsys)
    assert text.count(f"| {unet_name}, 8x8 latents | 2 | off | no | ") == len(names)
    assert text.count(" | 1 | on | no | ") == (len(names) if suite == "unet" else 0)


def test_a_denoising_step_is_warm_before_it_is_timed(tmp_path, monkeypatch):
    """A merge leaves new weights behind, and the first steps with them are slow."""
    log = []
    real = unets._forward_step

    def counted(model, inputs):
        step = real(model, inputs)
        return lambda: (log.append("step"), step())

    def timed(step, device):
        log.append("timed")
        step()
        return 1.0

    monkeypatch.setattr(unets, "_forward_step", counted)
    monkeypatch.setattr(unets, "clock", lambda device: timed)
    arguments = ["--suite", "inference", "--only", "plain", "--steps", 1, "--providers", "KronA (8,2), merged"]
    result = measured(tmp_path / "r.json", *arguments)
    assert result["clock"] == "cpu" and {row["provider"] for row in result["rows"]} == {"frozen", "KronA (8,2), merged"}
    for turn in " ".join(log).split("timed step timed step timed step")[:-1]:
        assert turn.split().count("step") >= unets.WARM_UP and "timed" not in turn


def test_qkv(tmp_path, capsys):
    result = measured(tmp_path / "r.json", "--suite", "qkv")
    assert [row["provider"] for row in result["rows"]] == ["frozen", "one by one", "together"]
    assert "| square: 5 tokens, 32 to 32 | (8,2) | together |" in table(tmp_path / "r.json", capsys)


def test_variants(tmp_path, capsys):
    result = measured(tmp_path / "r.json", "--suite", "variants")
    assert [(row["rule"], row["out"]) for row in result["rows"]] == [("batched", {}), ("batched", {})]
    assert all(set(row["seconds"]) >= {"torch batched", "torch expanded"} for row in result["rows"])
    assert "| square: 5 tokens, 32 to 32 | (8,2) |" in table(tmp_path / "r.json", capsys)


def test_host(tmp_path, capsys, monkeypatch):
    case = cases.HostCase("tiny", 2, 3, 8, 8, ((4, 2),))
    monkeypatch.setattr(cases, "HOST", (case, case._replace(name="side by side", n_out=16)))
    result = measured(tmp_path / "r.json", "--suite", "host")
    names = ["frozen", "PEFT LoRA r=4", "PEFT LoKr", "KronA (4,2)"]
    assert [(row["case"]["name"], row["provider"]) for row in result["rows"]] == [
        (case, name) for case in ("tiny", "side by side") for name in names
    ]
    for row in result["rows"]:
        assert row["training"]["p50"] > 0 and (row["provider"] != "PEFT LoRA r=4" or row["forward"]["of_lora"] == 1)
    assert table(tmp_path / "r.json", capsys).count("| KronA (4,2) |") == 2


def test_compiled_blocks_and_their_counts(tmp_path, capsys):
    """Blocks of two widths: two graphs without a break, whether adapted or not."""
    torch._dynamo.reset()
    result = measured(
        tmp_path / "r.json",
        *("--suite", "unet", "--only", "plain", "--providers", "KronA (8,2)", "--compile", "eager", "--repetitions", 1),
    )
    for row in result["rows"]:
        assert row["compiled"] and row["graph_breaks"] == 0 and row["compilations"] == 2, row
    assert table(tmp_path / "r.json", capsys).count("| 2 graphs, 0 breaks |") == 2
    torch._dynamo.reset()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_provider_with_wrong_numbers_has_no_speed(tmp_path, capsys, monkeypatch):
    def twice(linear, a_out, a_in):
        adapted = providers.krona(linear, a_out, a_in)
        return providers.Adapted(adapted.module, lambda: 2 * adapted.delta_weight())

    monkeypatch.setitem(providers.PROVIDERS, "KronA", twice)
    result = measured(tmp_path / "r.json", "--suite", "layer", "--only", "square")
    for row in result["rows"]:
        assert ("wrong" in row) == (row["provider"] == "KronA")
        assert ("training" in row) == ("peak_bytes" in row) == (row["provider"] != "KronA")
    assert "wrong: relative error" in table(tmp_path / "r.json", capsys)


def test_a_provider_that_raises_leaves_the_others_their_numbers(tmp_path, capsys, monkeypatch):
    def broken(linear, a_out, a_in):
        raise ValueError("no such kernel\nand more")

    monkeypatch.setitem(providers.PROVIDERS, "KronA", broken)
    result = measured(tmp_path / "r.json", "--suite", "layer", "--only", "square", status=1)
    (row,) = [row for row in result["rows"] if "failed" in row]
    assert row["provider"] == "KronA" and row["failed"] == "ValueError: no such kernel" and "training" not in row
    assert result["complete"]
    assert "| KronA |  | failed: ValueError: no such kernel |" in table(tmp_path / "r.json", capsys)


def test_a_variant_out_of_memory_is_a_row_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    tried = []
    real = unets._training_step

    def little_memory(model, inputs):
        batch, adapted = len(inputs["sample"]), hasattr(model, "peft_config")
        step = real(model, inputs)

        def fails():
            tried.append(adapted)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

        return fails if batch == 2 and adapted else step

    monkeypatch.setattr(unets, "_training_step", little_memory)
    result = measured(tmp_path / "r.json", "--suite", "unet", *UNET, "--batch", 2, 1)
    failed = {(row["provider"], row["batch"]) for row in result["rows"] if "failed" in row}
    assert failed == {("PEFT LoRA r=4", 2), ("KronA (8,2)", 2)}
    assert len(tried) == 2, "tried again in the second repetition"
    rows = {(row["provider"], row["batch"]): row for row in result["rows"]}
    assert rows["KronA (8,2)", 2]["failed"] == measure.OUT_OF_MEMORY
    assert rows["KronA (8,2)", 1]["training"]["over_lora"] > 0
    assert rows["frozen", 2]["training"]["over_frozen"] == 1 and rows["frozen", 2]["training"]["over_lora"] is None
    assert "| KronA (8,2) |  | failed: out of memory |" in table(tmp_path / "r.json", capsys)


def interrupt_at(monkeypatch, module, name, call):
    calls, real = [], getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


def test_an_interrupted_layer_run_keeps_its_cases(tmp_path, capsys, monkeypatch):
    interrupt_at(monkeypatch, layers, "_one_layer", 2)
    result = measured(tmp_path / "r.json", "--suite", "layer", status=130)
    assert not result["complete"] and {row["case"]["name"] for row in result["rows"]} == {"square"}
    text = table(tmp_path / "r.json", capsys)
    assert "Incomplete" in text and "| KronA |" in text and "other" not in text


@pytest.mark.parametrize("call,rows", [(1, 0), (2, 1), (3, 2), (5, 3)])
def test_an_interrupted_unet_run_keeps_its_providers(tmp_path, capsys, monkeypatch, call, rows):
    interrupt_at(monkeypatch, unets, "_measure", call)
    result = measured(tmp_path / "r.json", "--suite", "unet", *UNET, status=130)
    assert not result["complete"] and len(result["rows"]) == rows
    text = table(tmp_path / "r.json", capsys)
    assert "Incomplete" in text and ("Nothing was measured" in text) == (rows == 0)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--suite", "unet", "--providers", "KronA"], "it has ['frozen', 'PEFT LoRA r=4', 'PEFT LoKr', 'KronA (8,2)'"),
        (["--suite", "layer", "--providers", "LoRA"], "unknown to the suite 'layer': ['LoRA']; it has ['frozen',"),
        (["--suite", "qkv", "--providers", "KronA"], "unknown to the suite 'qkv'"),
        (["--suite", "layer", "--batch", "4"], "do not apply to the suite 'layer'"),
        (["--suite", "inference", "--gradient-checkpointing", "on"], "does not apply to the suite 'inference'"),
    ],
)
def test_command_lines_that_make_no_sense(capsys, arguments, message):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


def test_no_such_case(tmp_path, capsys):
    assert not measured(tmp_path / "r.json", "--suite", "layer", "--only", "SDXXL", status=1)["complete"]
    assert "'SDXXL'" in capsys.readouterr().out


# -- what the numbers mean ---------------------------------------------------------------------------------------------


def test_bytes_of_the_floor():
    """5 tokens, 6 to 10, 2 bytes a value: x and dX have 60 bytes, y, base and dY 100."""
    moved = layers.floor_bytes(5, 6, 10, torch.bfloat16)
    assert moved == {"forward": 60 + 100 + 100, "training": (60 + 100 + 100) + (100 + 60 + 60 + 60)}
    against = layers._against_the_floor(added=3e-6, moved=moved["forward"], bandwidth=2.6e8)
    assert against == pytest.approx({"floor": 1e-6, "over_floor": 3.0, "bytes_per_second": 260 / 3e-6})


def test_the_floor_is_reported_for_gpus_only(tmp_path, capsys):
    path = tmp_path / "r.json"
    result = measured(path, "--suite", "layer", "--only", "square")
    assert "floor" not in table(path, capsys).lower()
    path.write_text(json.dumps(result | {"device": "cuda"}))
    text = table(path, capsys)
    krona = next(row for row in result["rows"] if row["provider"] == "KronA")
    assert "Floor: " in text and text.count("of the floor") == 2
    assert f" | {krona['training']['over_floor']:.2f} | " in text


def test_flux_only_on_a_gpu():
    assert [case.name for case in cases.layers("cpu")] == ["square", "other"]
    flux = cases.layers("cuda", only="Flux")
    assert [(case.tokens, case.n_in, case.n_out) for case in flux] == [(4096, 3072, 3072)]


def test_the_order_differs_between_repetitions():
    log = []
    steps = {name: (lambda name=name: log.append(name)) for name in "abcd"}
    times = measure.interleaved(steps, 6, "cpu", "")
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abcd", 6)
    rounds = [tuple(log[i : i + 4]) for i in range(0, len(log), 4)]
    assert len(rounds) == 8 and all(sorted(r) == list("abcd") for r in rounds) and len(set(rounds)) > 4

    turns = [tuple(names) for names in unets.orders(list("abcd"), 6)]
    assert turns[0] == tuple("abcd"), "a run cut short has what others are compared with"
    assert len(turns) == 6 and all(sorted(t) == list("abcd") for t in turns) and len(set(turns)) > 3


def test_files_of_earlier_versions_can_be_read(capsys):
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        others = json.loads(path.read_text(encoding="utf-8"))["suite"] not in report.TABLES  # named, without a table
        assert (
            path.name in (text := table(path, capsys))
            and ("Not written by benchmarks.run" if others else "---:|") in text
        )


# -- gpu.sh ------------------------------------------------------------------------------------------------------------


def gpu_script(tmp_path, behaviour, **env):
    """gpu.sh with a stand-in for Python that notes its arguments and does as told for each suite."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f'#!/usr/bin/env bash\nprintf "%s\\t" "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls\n{behaviour}\n'
    )
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path / "out"],
        capture_output=True, text=True, env={**os.environ, "PYTHON": str(stand_in), **env}, timeout=60,
    )  # fmt: skip
    calls = (tmp_path / "calls").read_text().splitlines()
    return done, [line.rstrip("\t").split("\t")[1:] for line in calls]


def test_gpu_script_has_commands_that_parse(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real cases
    done, calls = gpu_script(tmp_path, "exit 0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"The numbers lie in {tmp_path / 'out'}:" in done.stdout and "please send them" in done.stdout
    *runs, tables = calls
    assert tables[0] == "benchmarks.report"
    suites = [run.parse(call[1:]) for call in runs]
    assert [(a.suite, a.compile) for a in suites] == [
        ("layer", None), ("unet", None), ("unet", "inductor"), ("qkv", None), ("variants", None), ("scaling", None),
        ("host", None), ("inference", None),
    ]  # fmt: skip
    assert all(a.device == "cuda" and a.dtype == "bfloat16" for a in suites)
    assert suites[1].batch == [1, 4] and suites[1].gradient_checkpointing == ["off", "on"]


def test_gpu_script_goes_on_after_a_part_that_was_cut_off(tmp_path):
    done, calls = gpu_script(tmp_path, 'case "$*" in *--compile*) exit 124;; *) exit 0;; esac')
    assert done.returncode == 1 and "Not finished: unet-compiled-cuda. " in done.stdout
    assert len(calls) == 9 and calls[-1][0] == "benchmarks.report"


def test_gpu_script_ends_in_time(tmp_path):
    done, calls = gpu_script(tmp_path, 'case "$*" in *benchmarks.run*) sleep 100;; esac', LIMIT="2")
    assert done.returncode == 1 and "layer-cuda: ended with status 124" in done.stdout
    assert len(calls) == 2 and calls[-1][0] == "benchmarks.report" and done.stdout.count("no time left") == 7


# -- counting ----------------------------------------------------------------------------------------------------------


def test_launches_and_bytes_are_those_of_the_ops(capsys):
    """By hand, for x (6, 8) to (6, 12) in bf16 with factors (4, 2) in fp32, of which B is (3, 4)."""
    case = cases.LinearCase("hand", 6, 8, 12)
    x, y, W, bias, h, A, B = 6 * 8, 6 * 12, 8 * 12, 12, 6 * 2 * 3, 4 * 2, 3 * 4
    frozen = launches.count("frozen", case, (4, 2), torch.bfloat16)
    assert frozen["forward"][0] == (1, 2 * (x + W + bias + y))
    assert frozen["training"][0] == (2, 2 * (x + W + bias + y) + 2 * (y + W + x))

    (_, forward), (_, training) = (launches.count("KronA", case, (4, 2), torch.bfloat16)[kind] for kind in frozen)
    names = [name.removeprefix("aten.") for name, _ in forward]
    assert names[:3] == ["addmm.default", "_to_copy.default", "_to_copy.default"]
    assert [moved for _, moved in forward[1:3]] == [(4 + 2) * A, (4 + 2) * B], "the factors are cast"
    assert ("aten.mm.default", 2 * (x + B + h)) in forward, "x times B"
    assert forward == training[: len(forward)] and training[-2:] != forward[-2:]
    added = {name for name, _ in training} - {name for name, _ in forward}
    assert not [name for name in added if "add.Tensor" in name], "the frozen layer's product adds to dX"

    lora = launches.count("PEFT LoRA r=4", case, (4, 2), torch.bfloat16)
    assert lora["training"][0].moved > sum(moved for _, moved in training)
    text = launches.table([case], (4, 2), torch.bfloat16)
    assert text.count("| hand: 6 x 8 to 12 |") == len(launches.providers())


def test_launches_of_the_kernels():
    pytest.importorskip("triton")
    case = cases.LinearCase("hand", 64, 64, 128)
    counted = launches.count("KronA, triton", case, (8, 4), torch.bfloat16)
    (_, forward), (_, training) = counted["forward"], counted["training"]
    assert [name for name, _ in forward] == ["aten.addmm.default", "forward_kernel"]
    assert [name for name, _ in training][2:] == ["aten.mm.default", "backward_kernel", "sum_kernel"]
    x, y, h, A, B = 64 * 64, 64 * 128, 64 * 4 * 16, 8 * 4, 16 * 16
    assert forward[1][1] == 2 * (x + y + y + h) + 4 * (A + B), "x, base and the factors are read, y and h written"


def test_an_expanded_dimension_is_in_memory_once():
    assert launches.distinct_bytes(torch.empty(3, 1, 2).expand(3, 5, 2)) == 3 * 2 * 4
    assert launches.distinct_bytes(torch.empty(0, 4)) == 0
