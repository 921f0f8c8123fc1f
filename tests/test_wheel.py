# SPDX-License-Identifier: Apache-2.0
"""What is published: the source distribution has all files, the wheel made of it works alone, a stranger's way with it.

Nothing is downloaded: the wheel is installed into a new environment that sees the installed packages it requires, and
no others.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from email.parser import Parser
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import peft_krona

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", minversion="77", reason="builds the wheel")
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("not run from a checkout or a source distribution", allow_module_level=True)
# of the host that the repository is on, and not of the project
NOT_SHIPPED = re.compile(r"^(\.github|\.ci)/|^\.gitattributes$")
ADDED = {"PKG-INFO", "setup.cfg"}


def files_of_the_project() -> set[str]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        names = {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    except (OSError, subprocess.CalledProcessError):  # a source distribution
        names = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()}
        names = {
            name for name in names if not re.search(r"__pycache__|\.egg-info/|^(output|dist|build|\.\w+_cache)/", name)
        }
    return {name for name in names if not NOT_SHIPPED.match(name)} - ADDED


def backend(call: str, folder: Path) -> None:
    code = f"import setuptools.build_meta as backend; backend.{call}"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel made of the sdist, the files that the sdist should have)"""
    folder = tmp_path_factory.mktemp("built")
    names = files_of_the_project()
    for name in names:  # a copy: building leaves folders of its own, and old ones would be taken over
        target = folder / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(ROOT / name, target)
        except OSError:
            shutil.copyfile(ROOT / name, target)
    backend(f"build_sdist({str(folder)!r})", folder / "tree")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (source,) = (folder / "sdist").iterdir()
    backend(f"build_wheel({str(folder)!r})", source)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel, names


def test_the_source_distribution_has_every_file(built):
    sdist, _, names = built
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    found = {name for name in found if ".egg-info/" not in name} - ADDED
    assert names <= found, sorted(names - found)[:10]
    assert found <= names, sorted(found - names)[:10]


def test_the_wheel_has_the_package_and_nothing_else(built):
    _, wheel, names = built
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {name.removeprefix("src/") for name in names if re.match(r"src/peft_krona/.*(\.py|py\.typed)$", name)}
    assert found == wanted and "peft_krona/py.typed" in found


def metadata_of(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        (scripts,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        return Parser().parsestr(archive.read(name).decode()), archive.read(scripts).decode()


def test_the_page_on_the_index(built):
    """What `twine check` looks at, and that every link of the long description leads to a file of this version."""
    found, scripts = metadata_of(built[1])
    assert found["Name"] == "peft-krona" and found["Version"] == peft_krona.__version__
    assert found["License-Expression"] == "Apache-2.0" and found["Summary"] and found["Keywords"]
    assert "peft-krona = peft_krona.__main__:main" in scripts
    urls = dict(url.split(", ") for url in found.get_all("Project-URL"))
    assert set(urls) == {"Repository", "Documentation", "Changelog", "Issues"}
    repository = urls["Repository"]
    assert all(url.startswith(repository) for url in urls.values())
    assert f'repository-code: "{repository}"' in (ROOT / "CITATION.cff").read_text()
    assert f"git clone {repository}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"plot", "diffusers", "triton", "demo", "examples", "app"} <= set(found.get_all("Provides-Extra"))
    if find_spec("trove_classifiers") is not None:
        assert set(found.get_all("Classifier")) <= import_module("trove_classifiers").classifiers

    text = found.get_payload()
    assert found["Description-Content-Type"] == "text/markdown" and text.startswith("# ")
    links = re.findall(r"\]\(([^)]+)\)", text)
    here = re.compile(
        rf"(?:{re.escape(repository)}/blob|https://raw\.githubusercontent\.com/peft-krona/peft-krona)/v([^/]+)/(\S+)"
    )
    own = [match for link in links if (match := here.fullmatch(link))]
    assert len(own) >= 10 and all(re.match(r"https://|#", link) for link in links), links
    assert all(match[1] == peft_krona.__version__ for match in own)
    missing = [match[2] for match in own if not (ROOT / match[2].partition("#")[0]).exists()]
    assert not missing
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures and all(link.startswith("https://raw.githubusercontent.com/") for link in pictures)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[a](b.md)", "[a](https://github.com/peft-krona/peft-krona/blob/v9/b.md)"),
        ("[a](b/c.md#d)", "[a](https://github.com/peft-krona/peft-krona/blob/v9/b/c.md#d)"),
        ("[**a**](b.md) ![c](d.png)", "[**a**](https://github.com/peft-krona/peft-krona/blob/v9/b.md) "
         "![c](https://raw.githubusercontent.com/peft-krona/peft-krona/v9/d.png)"),
        ("[a](https://b.c/d) [e](#f) [g](mailto:h@i.j)",) * 2,
        ("a[0](b) `x[1]`", "a[0](https://github.com/peft-krona/peft-krona/blob/v9/b) `x[1]`"),
    ],
)  # fmt: skip
def test_absolute_links(text, wanted):
    import runpy

    with_absolute_links = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["with_absolute_links"]
    assert with_absolute_links(text, "v9") == wanted


def test_one_tag_publishes():
    """Nothing but a tag starts it, the tag has to be the version, and no secret is in it."""
    if not (ROOT / ".github").is_dir():
        pytest.skip("a source distribution")
    yaml = pytest.importorskip("yaml")
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow[True] == {"push": {"tags": ["v*"]}} and "secrets." not in text and "password" not in text
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and set(publish["needs"]) == {"build", "test"}
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    check = next(step["run"] for step in workflow["jobs"]["build"]["steps"] if "The tag" in step.get("name", ""))
    lines = check.replace('! grep -q "^## $version (unreleased)" CHANGELOG.md\n', "")  # which it is, here
    for tag, status in ((f"v{peft_krona.__version__}", 0), ("v9.9.9", 1)):
        result = subprocess.run(["bash", "-e", "-c", lines], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": tag})
        assert result.returncode == status


# -- in an environment of its own --------------------------------------------------------------------------------------


def closure(requirements: list[str]) -> set[str]:
    """Names of the installed distributions that these require, all the way down."""
    found: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        extras = ("", *requirement.extras)
        if requirement.marker is not None and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            continue
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for text in needed:
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(Requirement(text.partition(";")[0]))
    return found


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """A new environment with the wheel; its own Python."""
    folder = tmp_path_factory.mktemp("alone")
    found, _ = metadata_of(built[1])
    names = closure([text for text in found.get_all("Requires-Dist") if "extra ==" not in text])
    assert {"torch", "peft", "transformers", "safetensors"} <= names and not names & {
        "diffusers",
        "matplotlib",
        "pillow",
    }
    packages = folder / "packages"
    packages.mkdir()
    for name in names:
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (packages / top).is_symlink():
                (packages / top).symlink_to(
                    file.locate().parents[len(file.parts) - 2] if len(file.parts) > 1 else file.locate()
                )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    Path(where.stdout.strip(), "dependencies.pth").write_text(f"{packages}\n")
    result = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", built[1]],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return python


def in_the_environment(python: Path, arguments: list, cwd: Path, path: str = "") -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PEFT_KRONA"))}
    return subprocess.run(
        arguments, cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**kept, "HF_HUB_OFFLINE": "1", **({"PYTHONPATH": path} if path else {})},
    )  # fmt: skip


ALONE = """
import importlib.util, sys
from importlib import metadata

import torch
import peft_krona
from peft import PeftModel, get_peft_model
from peft_krona.__main__ import main

assert peft_krona.__file__.startswith(sys.prefix), peft_krona.__file__
assert metadata.version("peft-krona") == peft_krona.__version__
assert not [n for n in ("diffusers", "matplotlib", "PIL", "bitsandbytes", "pytest") if importlib.util.find_spec(n)]

def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64))

model = get_peft_model(base(), peft_krona.KronAConfig(target_modules=["0"], a_out=8, a_in=4))
x = torch.randn(3, 64)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
for _ in range(2):
    model(x).square().sum().backward()
    optimizer.step()
model.save_pretrained("adapter")
assert torch.equal(PeftModel.from_pretrained(base(), "adapter")(x), model.eval()(x))
assert main(["inspect", "adapter"]) == 0
assert main(["convert", "adapter", "copy", "--to", "peft"]) == 0
assert main(["inspect", "copy", "--plot", "x.png"]) == 1
assert main(["merge", "somewhere", "adapter", "out"]) == 1
assert main(["plan", "FluxTransformer2DModel", "--budget", "5MB"]) == 1
"""


def test_the_wheel_alone(environment, tmp_path):
    result = in_the_environment(environment, [environment, "-c", ALONE], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "8 x 4" in result.stdout and "1 layers: 1 in model" in result.stdout
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and all("pip install" in line for line in errors) and "Traceback" not in result.stderr


def test_the_console_script(environment, tmp_path):
    script = environment.with_name("peft-krona")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for arguments, text in (
        (["--version"], f"peft-krona {peft_krona.__version__}\n"),
        (["--help"], "usage: peft-krona [-h] [--version] convert|inspect|merge|extract|plan|run"),
        (["merge", "--help"], "usage: peft-krona merge"),
    ):
        result = in_the_environment(environment, [script, *arguments], tmp_path)
        assert result.returncode == 0 and result.stdout.startswith(text), result.stdout + result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3 * 0.5


TRAINING = """
for step in range(2):
    noise, text = torch.randn(1, unet.config.in_channels, 8, 8), torch.randn(1, 4, unet.config.cross_attention_dim)
    unet(noise, 500, text).sample.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
AFTERWARDS = """
import sys

import peft_krona
from peft_krona import load_krona_weights
from peft_krona.__main__ import main
from safetensors.torch import load_file

assert peft_krona.__file__.startswith(sys.prefix), peft_krona.__file__
trained = {name: module.get_delta_weight("default").detach() for name, module in unet.named_modules()
           if isinstance(module, peft_krona.KronALayer)}
assert len(trained) == 56 and all(dW.norm() > 0 for dW in trained.values())

def picture(pipe):
    return pipe("a dog", num_inference_steps=1, generator=torch.manual_seed(0), output_type="pt").images

again = StableDiffusionPipeline.from_pretrained(BASE)
plain = picture(again)
load_krona_weights(again, "output/my-adapter", adapter_name="mine")
pipe.set_adapters("mine", 1.0)
assert torch.equal(picture(again), picture(pipe)) and not torch.equal(picture(again), plain)

assert main(["convert", "output/my-adapter", "output/comfy", "--dtype", "fp32", "--base", BASE]) == 0
file = load_file("output/comfy.safetensors")
for name, dW in trained.items():  # ComfyUI's names for this UNet: its layers' own, with underscores
    key = "lora_unet_" + name.replace(".", "_")
    A, B, alpha = (file.pop(f"{key}.{end}").double() for end in ("lokr_w1", "lokr_w2", "alpha"))
    error = (torch.kron(A, B.reshape(B.shape[0], -1)).reshape(dW.shape) - dW.double()).norm() / dW.double().norm()
    assert error < 1e-6, (name, error)  # fp32's own rounding of each factor, and LoKr's scale is 1 for two full factors
assert not file, list(file)[:3]
print("fine")
"""


def test_a_strangers_way(environment, tmp_path):
    """The wheel; the code of docs/from_lora.md, with a training loop; saved, reloaded, exported, the file verified."""
    pytest.importorskip("diffusers")
    page = (ROOT / "docs" / "from_lora.md").read_text(encoding="utf-8")
    diffs = [
        diff for diff in re.findall(r"```diff\n(.*?)```", page, flags=re.DOTALL) if "# ... the training loop" in diff
    ]
    (diff,) = [diff for diff in diffs if "StableDiffusionPipeline" in diff]
    code = "\n".join(line[1:] for line in diff.splitlines() if line[:1] in (" ", "+"))
    assert code.count("# ... the training loop ...") == 1
    code = code.replace("# ... the training loop ...", textwrap.dedent(TRAINING))
    (base,) = set(re.findall(r'from_pretrained\("(.+?)"\)', code))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    packages = Path(metadata.distribution("diffusers").locate_file(""))
    assert not (packages / "peft_krona").exists(), "the wheel is to be tried, not an installation"
    program = f"{code}\n{AFTERWARDS.replace('BASE', repr(base))}"
    result = in_the_environment(environment, [environment, "-c", program], tmp_path, path=str(packages))
    assert result.returncode == 0 and result.stdout.endswith("fine\n"), result.stdout[-2000:] + result.stderr[-3000:]
