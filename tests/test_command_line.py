# SPDX-License-Identifier: Apache-2.0
"""The command line from outside: how quickly it answers, how it ends, what it overwrites, which base model it takes."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_fixtures import attention, random_adapter, tiny_pipeline, tiny_unet
from safetensors.torch import save_file

import peft_krona
from peft_krona import _command_line, commands
from peft_krona.__main__ import main
from peft_krona.convert import BASES, AdapterFile, LayerUpdate, export, read_adapter
from peft_krona.convert.base_model import guess_base_and_why

SOURCE = Path(peft_krona.__file__).parents[1]
SUBCOMMANDS = (*commands.RUN, "run")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline's folder, and an adapter for its UNet and text encoder that says where it is."""
    folder = tmp_path_factory.mktemp("made")
    pipe = tiny_pipeline(folder)
    pipe.save_pretrained(folder / "pipe")
    adapter = random_adapter({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, attention)
    export(adapter, folder / "adapter", "peft")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """An empty current folder with links to the two."""
    (tmp_path / "pipe").symlink_to(made / "pipe")
    (tmp_path / "adapter").symlink_to(made / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def say_the_base(folder: Path, name: str) -> None:
    for file in folder.glob("**/adapter_config.json"):
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"base_model_name_or_path": name.format(part=file.parent.name)}))


def copy_of_the_adapter(made, out: Path, base: str) -> Path:
    export(read_adapter(made / "adapter"), out, "peft")
    say_the_base(out, base)
    return out


# -- quick answers -----------------------------------------------------------------------------------------------------


def program(arguments, torch_is: str, tmp_path: Path, **options):
    """`python -m peft_krona` where `import torch` does something else."""
    (tmp_path / "instead").mkdir(exist_ok=True)
    (tmp_path / "instead" / "torch.py").write_text(torch_is)
    path = os.pathsep.join([str(tmp_path / "instead"), str(SOURCE)])
    environment = {k: v for k, v in os.environ.items() if k != _command_line.TRACEBACK} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "peft_krona", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **options)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "usage: python -m peft_krona"),
        (["--version"], 0, f"peft-krona {peft_krona.__version__}\n"),
        *(([name, "--help"], 0, f"usage: python -m peft_krona {name}") for name in SUBCOMMANDS),
        ([], 2, "the following arguments are required"),
        (["convert"], 2, "the following arguments are required: input, output"),
        (["inspect", "x", "--what"], 2, "unrecognized arguments: --what"),
        (["nothing"], 2, "invalid choice: 'nothing'"),
        (["merge", "a", "b", "c", "--scale", "x"], 2, "invalid float value: 'x'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_help_and_usage_need_no_torch_and_half_a_second(arguments, status, text, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = program(arguments, "raise SystemExit('torch was imported')", tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == status, result.stderr
    assert text in (result.stdout if status == 0 else result.stderr)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # of the processor: hosts are busy


@pytest.mark.parametrize(
    ("argv", "orig_argv", "ours"),
    [
        (["-m"], ["python", "-m", "peft_krona"], True),
        (["-m", "convert", "x"], ["python", "-B", "-X", "dev", "-m", "peft_krona", "convert", "x"], True),
        (["/venv/bin/peft-krona", "--help"], ["/venv/bin/python", "/venv/bin/peft-krona", "--help"], True),
        (["peft-krona.exe"], ["peft-krona.exe"], True),
        (["-m", "peft_krona"], ["python", "-m", "pytest", "peft_krona"], False),
        (["-m", "-m", "peft_krona"], ["python", "-m", "accelerate", "-m", "peft_krona"], False),
        (["train.py", "--help"], ["python", "train.py", "--help"], False),
        (["-c", "--help"], ["python", "-c", "import peft_krona", "--help"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_only_our_own_process_is_answered(argv, orig_argv, ours):
    assert _command_line.is_program(argv, orig_argv) is ours


def test_the_help_names_every_format_and_explains_the_table(capsys):
    for arguments, words in (("convert", ("auto", "peft", *commands.FORMATS)), ("inspect", ("eff. rank", "singular"))):
        with pytest.raises(SystemExit):
            main([arguments, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(word in text for word in words)


# -- how it ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_is", "status", "text"),
    [
        ("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", -signal.SIGINT, "stopped\n"),
        ("import banana", 1, "error: This needs banana, which is not installed: pip install banana\n"),
        ("raise OSError('libfoo.so: cannot open shared object file')", 1, "error: OSError: libfoo.so: cannot open"),
    ],
    ids=["Ctrl-C", "ImportError", "OSError"],
)
def test_what_goes_wrong_while_torch_is_imported_is_one_line(torch_is, status, text, tmp_path):
    result = program(["inspect", "x"], torch_is, tmp_path)
    assert result.returncode == status and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(text)


def test_optional_libraries_are_quiet_and_a_reader_may_leave(here):
    """The whole program, into a pipe that nobody reads any longer: nothing is printed but the table's start."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "peft_krona", "inspect", "adapter"],
        stdout=write, stderr=subprocess.PIPE, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    os.close(write)
    assert (result.returncode, result.stderr) == (_command_line.NO_READER, "")


def test_real_warnings_of_the_same_libraries_are_shown():
    import logging

    name, notice = next(iter(_command_line._NOTICES.items()))
    logger = logging.getLogger(name)
    before, hook = logger.filters[:], sys.excepthook
    argv, orig_argv = sys.argv, sys.orig_argv
    try:
        sys.argv, sys.orig_argv = ["-m", "inspect", "x"], ["python", "-m", "peft_krona", "inspect", "x"]
        _command_line.begin()
        assert sys.excepthook is not hook
        said = [notice + ": no kernels", "the GPU is on fire"]  # asked of the filter: other tests may have silenced it
        shown = [text for text in said if logger.filter(logging.makeLogRecord({"name": name, "msg": text}))]
    finally:
        sys.argv, sys.orig_argv, sys.excepthook = argv, orig_argv, hook
        logger.filters[:] = before
    assert shown == ["the GPU is on fire"]


def fails(error):
    def command(options):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (PermissionError(errno.EACCES, "Permission denied", "a.bin"), 1, "error: a.bin: Permission denied."),
        (IsADirectoryError(errno.EISDIR, "Is a directory", b"a"), 1, "error: a: Is a directory."),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (OSError("Error no file named\n  x found in\ty"), 1, "error: Error no file named x found in y"),
        (ModuleNotFoundError("No module named 'diffusers'", name="diffusers.utils"), 1,
         'error: This needs diffusers, which is not installed: pip install "peft-krona[diffusers]"'),
        (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"), 1, '"peft-krona[plot]"'),
        (ModuleNotFoundError("No module named 'kernels'", name="kernels"), 1, "not installed: pip install kernels"),
        (ImportError("cannot import name 'A'", name="diffusers"), 1, "installation of diffusers whole?"),
        (ImportError("\nUNet requires the X library\nbut it was not found"), 1, "error: UNet requires the X library"),
        (MemoryError("Unable to allocate 9 TiB"), 1, "error: There is not enough memory. Unable to allocate 9 TiB"),
        (RecursionError("too deep"), 1, "RecursionError: too deep (Where"),
        (KeyError("unet"), 1, "error: KeyError: 'unet' (Where it happened is shown with PEFT_KRONA_TRACEBACK=1."),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), 1, "error: UnicodeDecodeError: 'utf-8' codec can't"),
        (AssertionError(), 1, "error: AssertionError: "),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else "",
)  # fmt: skip
def test_every_end_is_a_status_and_at_most_one_line(error, status, text, monkeypatch, capsys):
    monkeypatch.delenv(_command_line.TRACEBACK, raising=False)
    monkeypatch.setitem(commands.RUN, "inspect", fails(error))
    monkeypatch.setattr("peft_krona.__main__.nobody_reads", lambda: None)
    assert main(["inspect", "x"]) == status
    err = capsys.readouterr().err
    assert text in err and len(err.splitlines()) == bool(text)


def test_the_traceback_of_the_unexpected_is_there_on_request(monkeypatch):
    monkeypatch.setenv(_command_line.TRACEBACK, "1")
    monkeypatch.setitem(commands.RUN, "inspect", fails(KeyError("unet")))
    with pytest.raises(KeyError, match="unet"):
        main(["inspect", "x"])


@pytest.mark.parametrize("target", ["/dev/full", "pipe"])
def test_what_is_printed_may_find_no_place(target, here, monkeypatch, capsys):
    if target == "pipe":
        read, write = os.pipe()
        os.close(read)
        stream = os.fdopen(write, "w")
    elif os.path.exists(target):
        stream = open(target, "w")
    else:
        pytest.skip("no /dev/full")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["inspect", "adapter"]) == (141 if target == "pipe" else 1)
    assert capsys.readouterr().err == ("" if target == "pipe" else "error: [Errno 28] No space left on device\n")
    stream.close()


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device", "x")


def denied(*args, **kwargs):
    raise PermissionError(errno.EACCES, "Permission denied", "x")


@pytest.mark.parametrize(
    ("arguments", "without", "replaced", "text"),
    [
        ("merge pipe adapter out", "diffusers", None, 'needs diffusers, which is not installed: pip install "pe'),
        ("inspect adapter --plot x.png", "matplotlib", None, "A picture needs matplotlib: pip install 'peft-krona["),
        ("plan UNet2DConditionModel --budget 1MB", "diffusers", None, 'is not installed: pip install "peft-krona[di'),
        ("convert folder.safetensors out", None, None, "no safetensors file. Name the file itself."),
        ("inspect garbage.safetensors", None, None, "garbage.safetensors: not a safetensors file, or truncated"),
        ("inspect empty.safetensors", None, None, "not a safetensors file, or truncated: its 0 bytes"),
        ("inspect badjson", None, None, "adapter_config.json is not the config of a PEFT adapter: not valid JSON"),
        ("inspect /dev/null", None, None, "/dev/null: "),
        ("merge badpipe adapter out", None, None, "error: "),
        ("merge pipe/unet adapter out", None, None, "expected the folder of a diffusers pipeline, with"),
        ("merge missing adapter out", None, None, "missing: expected the folder of a diffusers pipeline"),
        ("extract missing pipe/unet out", None, None, "missing: there is no such file"),
        ("extract pipe pipe out", None, None, "pipe: there are no safetensors files in this folder."),
        ("inspect nobody/nothing", None, None, "not in the cache of the Hugging Face Hub"),
        ("convert adapter out --base nobody/nothing", None, None, "not in the cache of the Hugging Face Hub"),
        ("convert adapter out --to banana", None, None, "--to banana: expected one of auto, "),
        ("convert adapter garbage.safetensors/out --base pipe", None, None, "garbage.safetensors is a file, not a fo"),
        ("merge pipe adapter garbage.safetensors/out", None, None, "garbage.safetensors is a file, not a fo"),
        ("inspect adapter --plot garbage.safetensors/x.png", None, None, "garbage.safetensors is a file, not a fo"),
        ("inspect adapter --plot folder.png", None, None, "folder.png: expected the name of a file to write"),
        ("convert adapter out --base pipe", None, ("pathlib.Path.write_bytes", no_space), "x: No space left"),
        ("inspect garbage.safetensors", None, ("pathlib.Path.open", denied), "x: Permission denied."),
        ("convert adapter out --base pipe", None, ("os.access", lambda *a: False), "cannot be written to (no"),
        ("merge pipe adapter out", None, ("os.access", lambda *a: False), "cannot be written to (no"),
        ("inspect adapter --plot x.png", None, ("os.access", lambda *a: False), "cannot be written to (no"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_leave_nothing(arguments, without, replaced, text, here, monkeypatch, capsys):
    (here / "garbage.safetensors").write_bytes(os.urandom(100))
    (here / "empty.safetensors").touch()
    for name in ("folder.safetensors", "folder.png", "badjson", "badpipe"):
        (here / name).mkdir()
    (here / "badjson" / "adapter_config.json").write_bytes(b"\xff{")
    (here / "badpipe" / "model_index.json").write_text("{")
    before = sorted(here.rglob("*"))
    if without:
        monkeypatch.setitem(sys.modules, without, None)
        for name in [name for name in sys.modules if name.startswith(f"{without}.")]:
            monkeypatch.setitem(sys.modules, name, None)
    if replaced:
        monkeypatch.setattr(*replaced)
    assert main(arguments.split()) == 1
    monkeypatch.undo()
    err = [line for line in capsys.readouterr().err.splitlines() if "it/s]" not in line and "?it" not in line]
    assert text in err[-1] and err[-1].startswith("error: "), err
    assert sorted(here.rglob("*")) == before


# -- what is there already ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "made_first", "kept"),
    [
        ("convert adapter out.safetensors --base pipe", "out.safetensors", False),
        ("convert adapter out --base pipe --to lokr --split-terms", "out.safetensors", False),
        ("convert adapter out --to peft", "out/unet/adapter_config.json", False),
        ("convert adapter out --to peft", "out/thesis.txt", True),
        ("merge pipe adapter out", "out/model_index.json", False),
        ("merge pipe adapter out", "out/thesis.txt", True),
        ("merge pipe adapter out", "out", True),
        ("inspect adapter --plot out.png", "out.png", False),
    ],
)
def test_nothing_is_replaced_without_force_and_nothing_foreign_with_it(arguments, made_first, kept, here, capsys):
    file = here / made_first
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("precious")
    assert main(arguments.split()) == 1
    assert (
        f"{made_first.split('/')[0]}: exists already. Name a" in (text := capsys.readouterr().err) and "--force" in text
    )
    assert file.read_text() == "precious"
    assert main([*arguments.split(), "--force"]) == kept
    assert ("does not replace it" in capsys.readouterr().err) == kept
    assert (file.read_bytes() == b"precious") == kept
    assert sorted(path.name for path in here.iterdir()) == sorted(["adapter", "pipe", made_first.split("/")[0]])


def test_a_failure_with_force_keeps_what_was_there(here, capsys):
    assert main(["merge", "pipe", "adapter", "out"]) == 0
    before = {path: path.read_bytes() for path in (here / "out").rglob("*") if path.is_file()}
    assert main(["merge", "pipe", "adapter", "out", "--force", "--scale", "1e300"]) == 1
    assert "is NaN or infinite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (here / "out").rglob("*") if path.is_file()} == before
    assert main(["extract", "pipe/unet", "out/unet", "found", "--a-out", "8", "--a-in", "4"]) == 0
    assert main(["extract", "pipe/unet", "out/unet", "found", "--a-out", "8", "--a-in", "4"]) == 1
    assert main(["extract", "pipe/unet", "out/unet", "found", "--a-out", "4", "--a-in", "4", "--force"]) == 0
    assert "wrote found/unet/adapter_model.safetensors" in capsys.readouterr().out
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "found", "out", "pipe"]


@pytest.mark.parametrize(
    "arguments",
    [
        "merge pipe adapter pipe", "convert adapter adapter --to peft", "merge pipe adapter adapter",
        "extract pipe/unet pipe/unet pipe", "convert x.safetensors x.safetensors --base sd15",
        "convert adapter adapter/unet/adapter_model.safetensors --base sd15", "convert adapter adapter/unet --to peft",
        "merge pipe adapter pipe/unet", "extract pipe pipe/unet pipe/unet",
    ],
)  # fmt: skip
def test_what_is_read_is_never_replaced(arguments, here, capsys):
    key = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{key}.lora_down.weight": torch.ones(1, 4), f"{key}.lora_up.weight": torch.ones(4, 1)}, "x.safetensors")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert main([*arguments.split(), "--force"]) == 1
    assert "is read from there, so it is not written" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "", "x"], ["convert", "adapter", "x", "--base", ""], ["inspect", ""],
        ["inspect", "adapter", "--plot", ""], ["merge", "", "adapter", "x"],
        ["extract", "pipe", "", "x"], ["plan", "", "--budget", "1M"],
    ],
)  # fmt: skip
def test_an_empty_name_is_not_the_current_folder(arguments, here, capsys):
    before = sorted(here.iterdir())
    assert main(arguments) == 1
    assert "is empty. Was it given by a variable that is not set?" in capsys.readouterr().err
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("extract pipe/unet pipe/unet x --component nope", "--component nope: expected a part of a pipeline that"),
        ("extract pipe/unet pipe/unet x --component ../x", "--component ../x: expected a part of a pipeline"),
        ("inspect adapter --base nowhere", "nowhere: there is no such folder, and no weight for"),
        ("convert adapter x --base pipe/model_index.json", "--base pipe/model_index.json: expected one of sd15"),
        ("convert adapter x --base sd15 --scale 1e30", "would be NaN or infinite in torch.float16: the update is too"),
        ("convert adapter x --base sd15 --scale 1e-30", "is off by 1.0e+00 (relative), more than rounding"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(arguments, message, here, capsys):
    before = sorted(here.iterdir())
    assert main(arguments.split()) == 1
    assert message in capsys.readouterr().err
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
@pytest.mark.parametrize("text", ["[]", "{", "3", "\xff"])
def test_a_pipeline_whose_json_is_no_table(file, text, made, here, capsys):
    shutil.copytree(made / "pipe", here / "broken")
    (here / "broken" / file).write_text(text, encoding="latin-1")
    assert main(["merge", "broken", "adapter", "x"]) == 1
    error = capsys.readouterr().err
    assert f"broken/{file}: " in error and "fault of peft-krona" not in error and error.count("\n") == 1
    assert not (here / "x").exists()


def test_keys_in_messages_are_as_in_the_file():
    assert _command_line.in_flags("'base_model.model.x' is no base_model.") == "'base_model.model.x' is no --base."


# -- the base model ----------------------------------------------------------------------------------------------------


def test_inspect_takes_a_models_own_folder(made, here, capsys):
    export(random_adapter({"unet": tiny_unet()}, attention), here / "small", "peft")
    for adapter, base in (("small/unet", "pipe/unet"), ("small", "pipe/unet"), ("small/unet", "pipe")):
        assert main(["inspect", adapter, "--base", base]) == 0
        text = capsys.readouterr().out
        assert "unet: KronA adapts" in text and "eff. rank: how many directions share it" in text
    (here / "another_name").symlink_to(made / "pipe" / "unet")
    assert main(["inspect", "small/unet", "--base", "another_name"]) == 0
    assert main(["inspect", "small/unet", "--base", "pipe/text_encoder"]) == 1
    assert "the base model's safetensors files have no weight for unet." in capsys.readouterr().err
    assert main(["convert", "small", "out", "--base", "pipe/unet"]) == 0
    assert "base: pipe/unet: a UNet of another size (cross_attention_dim=" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pipe", "pipe/{part}"])
def test_the_base_that_the_adapter_names_is_taken_and_said(name, made, here, capsys):
    copy_of_the_adapter(made, here / "said", name)
    assert main(["inspect", "said"]) == 0
    text = capsys.readouterr().out
    assert "base: pipe, as the adapter says (base_model_name_or_path)" in text and "unet: KronA adapts" in text
    assert main(["convert", "said", "out"]) == 0
    assert "base: pipe, as the adapter says (base_model_name_or_path): a UNet of another" in capsys.readouterr().out
    assert main(["inspect", "said", "--base", "pipe/unet"]) == 1  # what is given counts
    assert "no weight for text_encoder." in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["", "checkpoint-1/"])
def test_a_base_that_is_named_from_the_adapters_folder(inside, made, here, monkeypatch, capsys):
    """As the training script writes it; and without a word of where on this machine it is."""
    out = here / "runs" / "mine" / inside
    copy_of_the_adapter(made, out, "../../pipe")
    monkeypatch.chdir(here / "runs")
    assert main(["convert", f"mine/{inside}", "out"]) == 0
    assert "pipe, as the adapter says (base_model_name_or_path): a UNet of another" in capsys.readouterr().out


def test_a_saved_adapter_names_its_base(here, capsys):
    """Of a UNet alone: diffusers keeps the path, under another name than transformers does."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained("pipe")
    peft_krona.add_krona(pipe, peft_krona.KronAConfig(a_out=4, a_in=2, init_weights=False))
    peft_krona.save_krona_weights(pipe, "saved")
    assert json.loads((here / "saved/unet/adapter_config.json").read_text())["base_model_name_or_path"] == "pipe/unet"
    assert main(["inspect", "saved"]) == 0
    assert "base: pipe, as the adapter says" in capsys.readouterr().out
    assert main(["convert", "saved", "out"]) == 0
    assert "base: pipe, as the adapter says" in capsys.readouterr().out


def test_a_file_names_its_base_too(made, here, capsys):
    copy_of_the_adapter(made, here / "said", "pipe")
    assert main(["convert", "said", "out"]) == 0
    capsys.readouterr()
    assert main(["inspect", "out.safetensors"]) == 0
    assert "base: pipe, as the adapter says" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (
            "/home/me/.cache/huggingface/hub/models--stabilityai--sdxl-turbo/snapshots/0123abc/unet",
            "stabilityai/sdxl-turbo",
        ),
        ("me/pipe", "me/pipe"),
        ("pipe/unet", "pipe/unet"),
        ("", None),
    ],
)
def test_the_name_of_a_model(path, name):
    from peft_krona.pipelines import _name_of

    model = torch.nn.Linear(1, 1)
    model.config = type("Config", (), {"_name_or_path": path})()
    assert _name_of(model) == name


def test_a_base_that_is_named_and_not_there(made, here, capsys):
    copy_of_the_adapter(made, here / "said", "nobody/nothing")
    assert main(["inspect", "said"]) == 0
    assert "base: nobody/nothing, as the adapter says, is not on disk; --base FOLDER adds" in capsys.readouterr().out
    assert main(["convert", "said", "out"]) == 1  # nothing else tells it
    captured = capsys.readouterr()
    assert "base: nobody/nothing, as the adapter says (base_model_name_or_path), is not taken: " in captured.out
    assert "do not tell which Stable Diffusion it is for. Say so with --base sd15, sd2, sdxl" in captured.err


def test_a_base_that_is_named_and_another_by_now(made, here, capsys):
    (here / "other").mkdir()
    (here / "other" / "model_index.json").write_text("{}")
    copy_of_the_adapter(made, here / "said", "other")
    assert main(["inspect", "said"]) == 0
    assert "base: other, as the adapter says, is not taken: " in capsys.readouterr().out


def test_ids_on_the_hub(made, here, monkeypatch, capsys):
    monkeypatch.setattr(commands, "find", lambda source: made / "adapter" if source == "me/robot" else None)
    monkeypatch.setattr(commands, "find_configs", lambda source: made / "pipe" if source == "me/pipe" else None)
    assert main(["inspect", "me/robot"]) == 0
    assert main(["convert", "me/robot", "out", "--base", "me/pipe"]) == 0
    assert "base: me/pipe: a UNet of another size" in capsys.readouterr().out
    assert main(["merge", "pipe", "me/robot", "merged"]) == 0


def layer(module, rows=8, columns=8):
    return LayerUpdate("unet", module, torch.ones(1, 2, 2), torch.ones(1, rows // 2, columns // 2))


SD15 = layer("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 320, 768)
SDXL = layer("down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k", 640, 2048)


@pytest.mark.parametrize(
    ("tells", "kind", "why"),
    [
        (SD15, "sd15", "the input size 768 of unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"),
        (SDXL, "sdxl", "the input size 2048 of unet.down_blocks.1."),
        (layer("mid_block.attentions.0.transformer_blocks.9.attn1.to_q", 1280, 1280), "sdxl", "the number of"),
        (LayerUpdate("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", torch.ones(1, 2, 2), torch.ones(1, 2, 2)),
         "sdxl", "its second text encoder"),
    ],
)  # fmt: skip
def test_the_guess_is_said(tells, kind, why, here, capsys):
    export(AdapterFile((tells,)), here / "in", "peft")
    assert main(["convert", "in", "out"]) == 0
    assert f"base: {kind}, guessed from {why}" in (text := capsys.readouterr().out) and "; --base says it if" in text


@pytest.mark.parametrize(
    ("tells", "another", "text"),
    [
        (SDXL, "down_blocks.3.resnets.0.time_emb_proj", "is in block 3, and it has 3 blocks there"),
        (SDXL, "up_blocks.3.attentions.0.proj_in", "is in block 3, and it has 3 blocks there"),
        (SDXL, "down_blocks.0.attentions.0.proj_in", "of attentions it has 0 there"),
        (SDXL, "up_blocks.2.attentions.0.proj_in", "of attentions it has 0 there"),
        (SDXL, "down_blocks.1.attentions.2.proj_in", "of attentions it has 2 there"),
        (SDXL, "up_blocks.0.resnets.3.time_emb_proj", "of resnets it has 3 there"),
        (SDXL, "mid_block.attentions.1.proj_in", "of attentions it has 1 there"),
        (SDXL, "down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_q", "have 2 transformer blocks"),
        (SDXL, "mid_block.attentions.0.transformer_blocks.10.attn1.to_q", "have 10 transformer blocks"),
        (SD15, "down_blocks.4.resnets.0.time_emb_proj", "is in block 4, and it has 4 blocks there"),
        (SD15, "down_blocks.3.attentions.0.proj_in", "of attentions it has 0 there"),
        (SD15, "mid_block.attentions.0.transformer_blocks.1.attn1.to_q", "have 1 transformer blocks"),
    ],
)
def test_blocks_that_the_guessed_base_does_not_have_are_errors(tells, another, text, here, capsys):
    export(AdapterFile((tells, layer(another))), here / "in", "peft")
    kind = "sdxl" if tells is SDXL else "sd15"
    for base in ([], ["--base", kind]):
        assert main(["convert", "in", "out", *base]) == 1
        err = capsys.readouterr().err
        assert text in err and f"unet.{another}" in err and "Give the folder of the base model" in err and kind in err
    assert [path.name for path in here.glob("out*")] == []


def test_a_unet_of_other_widths_is_no_guess(here, capsys):
    other = layer("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 768, 768)
    export(AdapterFile((SDXL, other)), here / "in", "peft")
    assert main(["convert", "in", "out"]) == 1
    assert f"would be sdxl, but {other.name} has 768 outputs, and sdxl's has 1280." in capsys.readouterr().err


@pytest.mark.parametrize("kind", BASES)
def test_every_layer_of_the_real_unets_passes(kind):
    from test_convert_names import real_unet

    from peft_krona.convert import shapes_of_models

    shapes = shapes_of_models({"unet": real_unet(kind)})["unet"]
    one = torch.ones(1, 1, 1)
    layers = tuple(
        LayerUpdate("unet", name, one, torch.empty(1, *shape, device="meta").expand(1, *shape))
        for name, shape in shapes.items()
        if len(shape) in (2, 4)
    )
    assert guess_base_and_why(AdapterFile(layers))[0] == kind
