# SPDX-License-Identifier: Apache-2.0
"""backend="auto": what is chosen, what is measured and when not, and the table on disk."""

import json
import multiprocessing
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from peft_krona.errors import BackendError
from peft_krona.ops import backend, kron_linear, linear, linear_kron_linear, torch_impl, tuning
from peft_krona.ops.torch_impl import Plan

ALL = ["torch batched", "torch paired", "torch expanded"]
SIZES = (1, 8, 2, 3, 12)  # r, a_out, a_in, b_out, b_in: b_first, every form exists, "expanded" is the rule on a CPU
PRODUCT = "none float32 kron b_first r=1 A=8x2 B=3x12"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_KRONA_CACHE", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    torch._dynamo.reset()
    forget()
    yield
    forget()


def forget():
    """As in a new process."""
    for state in (tuning._tables, tuning._choices, tuning._warned):
        state.clear()


def make(tokens=6, sizes=SIZES, dtype=torch.float32):
    r, a_out, a_in, b_out, b_in = sizes
    shapes = (tokens, a_in * b_in), (r, a_out, a_in), (r, b_out, b_in)
    return [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]


def label():
    return tuning._device_name(torch.device("cpu"), torch.get_num_threads())


def file():
    return Path(tuning.table_path(label()))


def on_disk():
    return json.loads(file().read_text(encoding="utf-8"))["seconds"]


def put(seconds, **other):
    """A table on disk: the seconds of make()'s product for each number of tokens."""
    content = {"device": label(), "versions": tuning._versions(), "seconds": {PRODUCT: seconds}, **other}
    file().write_text(json.dumps(content), encoding="utf-8")


def take(x, A, B, into="none", order=None):
    """What is chosen: the form, or "triton"."""
    name, plan = tuning.choose(Plan.of(A, B, "kron", order), x, into, linear._apply)
    return plan.form if name == "torch" else name


@pytest.fixture
def clock(monkeypatch):
    """Seconds that each candidate seems to take, and the names of those that ran."""
    seconds, ran = dict.fromkeys(ALL, 1.0), []

    def timed(run, device):
        ran.append(run.args[0])
        return seconds[run.args[0]], run()

    monkeypatch.setattr(tuning, "_timed", timed)
    return seconds, ran


@pytest.fixture
def never(monkeypatch):
    monkeypatch.setattr(tuning, "measure", lambda *args: pytest.fail("this should not be measured"))


def spoil(monkeypatch, function, form, spoiled, which=None):
    """In one form, `function` of torch_impl gives what `spoiled` makes of one of its results."""
    original = getattr(torch_impl, function)

    def replaced(*args):
        result = original(*args)
        if args[-1] != form:
            return result
        if which is None:
            return spoiled(result)
        return tuple(spoiled(t) if i == which else t for i, t in enumerate(result))

    monkeypatch.setattr(torch_impl, function, replaced)


# -- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quickest", ALL)
def test_the_quickest_is_chosen_and_computes(monkeypatch, clock, quickest):
    clock[0][quickest] = 0.5
    x, A, B = make()
    assert take(x, A, B) == quickest[6:]
    assert set(clock[1]) == set(ALL)
    used = []
    for name in ("mix", "mix_backward"):
        original = getattr(torch_impl, name)
        monkeypatch.setattr(torch_impl, name, lambda *args, f=original: (used.append(args[-1]), f(*args))[1])
    kron_linear(x, A, B, backend="auto").sum().backward()
    assert used == [quickest[6:]] * 2


def test_results_are_those_of_plain_torch():
    x, A, B = make(40)
    W, b, base = torch.randn(24, 24), torch.randn(24), torch.randn(40, 24)
    for op in (
        lambda name: kron_linear(x, A, B, scale=0.3, backend=name),
        lambda name: kron_linear(x, A, B, scale=0.3, base=base, layout="diffusekrona", backend=name),
        lambda name: kron_linear(x.view(4, 10, 24), A, B, base=base.view(4, 10, 24).double(), backend=name),
        lambda name: kron_linear(x, A, B, order="a_first", backend=name),
        lambda name: linear_kron_linear(x, W, b, A, B, scale=0.3, backend=name),
    ):
        got, want = op("auto"), op("torch")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        dy = torch.randn_like(want)
        for g, w in zip(torch.autograd.grad(got, (x, A, B), dy), torch.autograd.grad(want, (x, A, B), dy), strict=True):
            torch.testing.assert_close(g, w)
    assert {name.split()[0] for name in on_disk()} == {"none", "base", "linear"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("into", ["none", "base", "linear"])
def test_every_candidate_that_is_right_is_in(into, dtype):
    """With the real checks and clock; enough tokens for the sums' order to show in the gradients."""
    x, A, B = make(700, (2, 8, 2, 3, 40), dtype)
    assert take(x, A, B, into) in ("batched", "paired", "expanded")
    (measured,) = on_disk().values()
    assert list(measured) == ["1024"] and list(measured["1024"]) == ALL
    assert all(t > 0 for t in measured["1024"].values())


@pytest.mark.parametrize("function,which", [("mix", None), ("mix_backward", 0), ("mix_backward", 1)])
@pytest.mark.parametrize(
    "spoiled,reason",
    [(lambda t: t * 1.01, "has a relative error of 1.0e-02"), (lambda t: t * float("nan"), "relative error of nan")],
    ids=["wrong", "nan"],
)
def test_a_wrong_candidate_is_out(monkeypatch, clock, caplog, function, which, spoiled, reason):
    clock[0]["torch paired"], clock[0]["torch expanded"] = 0.1, 0.5
    spoil(monkeypatch, function, "paired", spoiled, which)
    assert take(*make()) == "expanded"
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "torch paired is out" in record.message and reason in record.message
    assert not file().exists()  # it may be right the next time


@pytest.mark.parametrize("error", [RuntimeError("no such kernel\nlong story"), torch.OutOfMemoryError("too little")])
def test_a_candidate_that_raises_is_out(monkeypatch, clock, caplog, error):
    def fail(_):
        raise error

    clock[0]["torch paired"] = 0.1
    spoil(monkeypatch, "mix_backward", "paired", fail)
    assert take(*make()) == "batched"
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert record.message.endswith(f"torch paired is out: {type(error).__name__}: {str(error).splitlines()[0]}")


def test_a_candidate_that_raises_only_while_it_is_timed_is_out(monkeypatch, clock, caplog):
    clock[0]["torch paired"] = 0.1
    calls = []

    def fail_late(result):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("late")
        return result

    spoil(monkeypatch, "mix", "paired", fail_late)
    assert take(*make()) == "batched" and "torch paired is out: RuntimeError: late" in caplog.text


def test_the_default_stands_if_nothing_can_be_measured(monkeypatch, caplog):
    def too_much(*args):
        raise torch.OutOfMemoryError("too little")

    monkeypatch.setattr(tuning, "_random_step", too_much)
    caplog.set_level("INFO", logger="peft_krona.ops.tuning")
    x, A, B = make()
    assert take(x, A, B) == "expanded" == Plan.of(A, B, "kron").form
    assert take(x, A, B) == "expanded"  # and it is not tried at every call
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert "every candidate is out: OutOfMemoryError: too little" in caplog.text


def test_an_interrupt_passes_through(monkeypatch, clock):
    def interrupt(_):
        raise KeyboardInterrupt

    spoil(monkeypatch, "mix", "paired", interrupt)
    with pytest.raises(KeyboardInterrupt):
        take(*make())


def test_candidates():
    def of(r, a_out, a_in, b_out, b_in, layout="kron", order=None):
        A, B = torch.empty(r, a_out, a_in), torch.empty(r, b_out, b_in)
        return tuning.candidates(Plan.of(A, B, layout, order), A.device, A.dtype)

    assert of(*SIZES) == ALL
    assert of(*SIZES, layout="diffusekrona") == ["torch batched", "torch expanded"]
    assert of(*SIZES, order="a_first") == ["torch batched"]
    assert of(1, 7, 2, 3, 12) == ["torch batched", "torch expanded"]  # no pairs of rows
    assert of(1, 32, 8, 32, 32, order="b_first") == ["torch batched", "torch paired"]  # expanded: as large as dW
    assert of(4, 8, 2, 4, 8, order="b_first") == ["torch batched", "torch paired"]  # expanded: twice as large


def test_one_candidate_is_not_measured(never):
    x, A, B = make()
    assert take(x, A, B, order="a_first") == "batched"
    torch.testing.assert_close(
        kron_linear(x, A, B, order="a_first", backend="auto"), kron_linear(x, A, B, order="a_first", backend="torch")
    )


def test_the_environment_turns_it_on(monkeypatch, clock):
    monkeypatch.setattr(backend, "DEFAULT", "auto")
    kron_linear(*make())
    assert on_disk().keys() == {PRODUCT}


def test_an_unknown_backend_is_named():
    with pytest.raises(BackendError, match=r"'fastest' is unknown; expected one of \('torch', 'triton', 'auto'\)"):
        kron_linear(*make(), backend="fastest")


# -- measuring -------------------------------------------------------------------------------------------------------


def test_once_a_shape_with_one_log_line(clock, caplog):
    caplog.set_level("INFO", logger="peft_krona.ops.tuning")
    x, A, B = make(8)
    for tokens in (8, 5, 8, 7):  # all rounded up to 8
        kron_linear(x[:tokens], A, B, backend="auto")
    times = "torch batched 1000.000 ms, torch paired 1000.000 ms, torch expanded 1000.000 ms"
    assert [r.message for r in caplog.records] == [
        f"Kronecker product {PRODUCT}, 8 tokens, on {label()}: {times}. Chosen: torch batched."
    ]
    kron_linear(x[:4], A, B, backend="auto")
    kron_linear(*make(8, dtype=torch.bfloat16), backend="auto")
    kron_linear(x, A, B, base=x, backend="auto")
    kron_linear(x, A, B, layout="diffusekrona", backend="auto")
    assert len(caplog.records) == 5


def test_few_runs_where_they_take_long(monkeypatch, clock):
    monkeypatch.setattr(tuning, "PATIENCE", -1)
    take(*make())
    assert len(clock[1]) == (2 + 3) * len(ALL)


def test_tokens_are_bounded(monkeypatch, clock):
    monkeypatch.setattr(tuning, "MOST_TOKENS", 16)
    x, A, B = make(100)
    take(x, A, B)
    assert list(on_disk()[PRODUCT]) == ["16"]


def test_random_states_stay(clock):
    tensors = make()
    before = torch.get_rng_state(), random.getstate()
    take(*tensors)
    assert clock[1] and torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference", "autocast"],
)
def test_the_callers_modes_do_not_matter(clock, caplog, mode):
    x, A, B = make()
    with mode():
        y = kron_linear(x, A, B, backend="auto")
    assert set(clock[1]) == set(ALL) and "is out" not in caplog.text
    assert list(on_disk()) == [PRODUCT.replace("float32", str(y.dtype)[6:])]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_does_not_notice(clock, caplog, reentrant):
    """Its hooks count the tensors that are saved for backward, and run the whole region anew when one is asked for."""
    clock[0]["torch paired"] = 0.5
    x, A, B = make()
    runs = []

    def region(x, A, B):
        runs.append(1)
        return kron_linear(x, A, B, backend="auto").tanh()

    y = checkpoint(region, x, A, B, use_reentrant=reentrant)
    assert len(runs) == 1 and clock[1]
    got = (t.grad for t in (y.sum().backward(), x, A, B)[1:])
    want = torch.autograd.grad(kron_linear(x, A, B, backend="torch").tanh().sum(), (x, A, B))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    assert len(runs) == 2 and "is out" not in caplog.text


# -- where it must not measure ---------------------------------------------------------------------------------------


def test_ci_measures_nothing_but_reads(monkeypatch, never):
    monkeypatch.setenv("CI", "true")
    x, A, B = make(6)
    assert take(x, A, B) == "expanded" and not file().exists()
    put({"4": {"torch batched": 1.0}, "16": {"torch batched": 2.0, "torch paired": 1.0}})
    forget()
    assert take(x[:4], A, B) == "batched"
    assert take(x[:5], A, B) == "paired"  # the next larger number of tokens
    assert take(*make(40)) == "paired"  # or else the largest


def test_torch_func_measures_nothing(never):
    x, A, B = (t.detach() for t in make())
    W = torch.randn(24, 24)
    for op in (
        lambda A, name: kron_linear(x, A, B, backend=name),
        lambda A, name: linear_kron_linear(x, W, None, A, B, backend=name),
    ):
        got, want = (torch.func.grad(lambda A: op(A, name).square().sum())(A) for name in ("auto", "torch"))  # noqa: B023
        torch.testing.assert_close(got, want)
    per_sample = torch.vmap(lambda x: kron_linear(x, A, B, backend="auto"))(x)
    torch.testing.assert_close(per_sample, kron_linear(x, A, B, backend="torch"))


@pytest.mark.parametrize("tokens", [{}, {"8": {"torch paired": 1.0, "torch batched": 2.0}}], ids=["rule", "table"])
def test_torch_compile_measures_nothing_but_reads(never, tokens):
    put(tokens)
    x, A, B = make()
    W = torch.randn(24, 24)

    def function(x, A, B):
        y = linear_kron_linear(x, W, None, A, B, backend="auto")
        return kron_linear(x, A, B, backend="auto") + y.relu()

    code = torch._dynamo.explain(function)(x, A, B).graphs[0].code
    assert ("torch.cat" in code) == bool(tokens)  # the pairs of rows
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = kron_linear(x, A, B, backend="torch") + linear_kron_linear(x, W, None, A, B, backend="torch").relu()
    torch.testing.assert_close(compiled(x, A, B), want)
    got = torch.autograd.grad(compiled(x, A, B).square().sum(), (x, A, B))
    for g, w in zip(got, torch.autograd.grad(want.square().sum(), (x, A, B)), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("measured,graphs", [([], 1), (["8"], 2)], ids=["rule", "table"])
def test_dynamic_shapes_compile_once_a_number_of_tokens_in_the_table(never, measured, graphs):
    put({tokens: {"torch paired": 1.0} for tokens in measured})
    _, A, B = make()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda x: kron_linear(x, A, B, backend="auto"), fullgraph=True, dynamic=True, backend=counter
    )
    for count in (5, 4, 7, 9, 16, 21):
        compiled(torch.randn(count, 24))
    assert counter.frame_count == graphs


def test_fake_and_meta_tensors_measure_nothing(never):
    x, A, B = make()
    assert take(*(t.to("meta") for t in (x, A, B))) == "expanded"
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, A, B)]
        assert kron_linear(*fake, backend="auto").shape == (6, 24)
    assert take(fake[0], A, B) == "expanded"  # also where the mode is not active


def test_a_dispatch_mode_sees_no_measuring(never):
    with FlopCounterMode(display=False) as counter:
        kron_linear(*make(), backend="auto")
    assert counter.get_total_flops() > 0


def test_zero_tokens_measure_nothing(never):
    x, A, B = make(0)
    y = kron_linear(x, A, B, backend="auto")
    assert y.shape == (0, 24)
    assert not torch.autograd.grad(y.sum(), A)[0].any()


# -- the table on disk -----------------------------------------------------------------------------------------------


def test_a_new_process_reads_the_table(clock, monkeypatch):
    clock[0]["torch paired"] = 0.5
    x, A, B = make()
    assert take(x, A, B) == "paired"
    assert on_disk() == {PRODUCT: {"8": clock[0]}}
    forget()
    monkeypatch.setattr(tuning, "measure", lambda *args: pytest.fail("this should not be measured"))
    assert take(x, A, B) == "paired"


@pytest.mark.parametrize("package", ["torch", "triton", "peft-krona"])
def test_a_table_of_other_versions_is_ignored_and_overwritten(clock, package):
    clock[0]["torch paired"] = 0.5
    put({"8": {"torch batched": 1e-9}}, versions=tuning._versions() | {package: "0.0.1"})
    assert take(*make()) == "paired"
    content = json.loads(file().read_text(encoding="utf-8"))
    assert content["versions"] == tuning._versions()
    assert content["seconds"] == {PRODUCT: {"8": clock[0]}}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"device": 1, "versions": {}, "seconds": []}', "seconds", "numbers"],
    ids=repr,
)
def test_a_file_that_is_no_table_is_ignored_and_overwritten(clock, caplog, content):
    clock[0]["torch paired"] = 0.5
    if isinstance(content, bytes):
        file().write_bytes(content)
    else:
        put({"8": {"torch batched": None}} if content == "numbers" else [1])
    assert take(*make()) == "paired"
    assert on_disk() == {PRODUCT: {"8": clock[0]}}
    if b"device" not in (content if isinstance(content, bytes) else b""):
        (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
        assert f"{file()} is ignored: it is no table of measurements" in record.message


def test_candidates_that_do_not_exist_here_are_passed_over(never):
    put({"8": {"triton": 0.1, "torch other": 0.2, "torch batched": 2.0, "torch paired": 1.0}})
    assert take(*make()) == "paired"


def test_what_others_wrote_meanwhile_stays(clock):
    x, A, B = make(16)
    take(x[:2], A, B)
    mine = {name: dict(tables) for name, tables in tuning._tables.items()}
    put({"4": {"torch batched": 3.0}, "2": {"torch batched": 4.0}})  # another process; about 2 tokens ours is as good
    assert mine == tuning._tables
    take(x, A, B)
    assert on_disk() == {PRODUCT: {"2": clock[0], "4": {"torch batched": 3.0}, "16": clock[0]}}
    assert [path.name for path in file().parent.iterdir()] == [file().name]  # no temporary files


def _write_often(number):
    forget()
    for tokens in range(50):
        tuning._table(label()).setdefault(f"product {number}", {})[tokens] = dict.fromkeys(ALL, 1.0)
        tuning._write(label())
        assert not tuning._warned, tuning._warned


def test_processes_do_not_corrupt_it(caplog):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        tuning._read(label())
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4 and not caplog.records
    assert on_disk().keys() <= {f"product {number}" for number in range(4)}
    assert any(len(measured) == 50 for measured in on_disk().values())


def test_a_folder_that_cannot_be_written(clock, caplog, monkeypatch, tmp_path):
    clock[0]["torch paired"] = 0.5
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PEFT_KRONA_CACHE", str(tmp_path / "file" / "folder"))
    x, A, B = make(16)
    for tokens in (2, 16, 2):
        assert take(x[:tokens], A, B) == "paired"
    (record,) = [r for r in caplog.records if r.levelname == "WARNING" and "cannot be written" in r.message]
    assert "lasts as long as this process" in record.message


@pytest.mark.parametrize(
    "variables,folder",
    [
        ({"PEFT_KRONA_CACHE": "~/mine", "XDG_CACHE_HOME": "/xdg"}, "/home/me/mine"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/peft-krona"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/peft-krona"),
    ],
)
def test_where_the_table_lies(monkeypatch, variables, folder):
    for name in ("PEFT_KRONA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert tuning.table_path("NVIDIA H100 80GB HBM3") == f"{folder}/NVIDIA-H100-80GB-HBM3.json"


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_on_a_gpu(dtype, caplog):
    caplog.set_level("INFO", logger="peft_krona.ops.tuning")
    x, A, B = (t.detach().cuda().requires_grad_() for t in make(1000, (1, 64, 4, 20, 320), dtype))
    W, b = torch.randn(1280, 1280, device="cuda", dtype=dtype) / 36, torch.randn(1280, device="cuda", dtype=dtype)
    before = torch.cuda.get_rng_state()
    dy = None
    for op in (
        lambda name: kron_linear(x, A, B, base=F.linear(x, W, b), backend=name),
        lambda name: linear_kron_linear(x, W, b, A, B, backend=name),
    ):
        got, want = op("auto"), op("torch")
        dy = torch.ones_like(want) if dy is None else dy
        results = zip(
            (got, *torch.autograd.grad(got, (x, A, B), dy)),
            (want, *torch.autograd.grad(want, (x, A, B), dy)),
            strict=True,
        )
        for g, w in results:
            assert (g - w).float().norm() <= max(8 * torch.finfo(dtype).eps, tuning.TF32) * w.float().norm()
    assert torch.equal(before, torch.cuda.get_rng_state())
    names = tuning.candidates(Plan.of(A, B, "kron"), x.device, dtype)
    assert set(tuning._choices.values()) <= set(names)
    device_name = tuning._device_name(x.device, torch.get_num_threads())
    content = json.loads(Path(tuning.table_path(device_name)).read_text(encoding="utf-8"))
    assert [list(measured["1024"]) for measured in content["seconds"].values()] == [names] * 2, caplog.text


@pytest.mark.gpu
def test_capturing_a_cuda_graph_measures_nothing(never):
    x, A, B = (t.detach().cuda() for t in make(1000, (1, 64, 4, 20, 320)))
    want = kron_linear(x, A, B, backend="torch")  # libraries make their handles here
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kron_linear(x, A, B, backend="auto")
    graph.replay()
    torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-3)
