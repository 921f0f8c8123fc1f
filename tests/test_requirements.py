# SPDX-License-Identifier: Apache-2.0
"""What is pinned can be installed: on every supported Python, with the CPU and with the ordinary build of torch.

The packages installed here tell what they require. What they require on other Pythons, and what torch's ordinary build
requires, is written down below, as pip reported it (`pip install --dry-run --report`).
"""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it to Python 3.10

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"

# Distribution: (Requires-Python, what it requires of other packages that are pinned)
WRITTEN = {
    # the build for Linux that the index of Python packages serves, with CUDA; the CPU build requires no triton
    "torch 2.13.0": (">=3.10", ['triton==3.7.1; platform_system == "Linux" and python_version < "3.15"']),
    "triton 3.7.1": (">=3.10,<3.15", []),
    "numpy 2.2.6": (">=3.10", []),
    "numpy 2.4.6": (">=3.11", []),
    "pillow 12.3.0": (">=3.10", []),
    "diffusers 0.41.0": (">=3.10.0", ["huggingface-hub<2.0,>=1.32.0", "numpy", "safetensors>=0.8.0", "Pillow"]),
    "diffusers 0.42.1": (">=3.11.0", ["huggingface-hub<3.0,>=1.32.0", "numpy", "safetensors>=0.8.0", "Pillow"]),
    "transformers 5.20.2": (
        ">=3.10.0",
        ["huggingface-hub<3.0,>=1.31.0", "numpy>=1.17", "tokenizers<0.24.0,>=0.23.1", "safetensors>=0.8.0"],
    ),
    "transformers 5.23.0": (
        ">=3.11.0",
        ["huggingface-hub<3.0,>=1.31.0", "numpy>=1.17", "tokenizers<0.24.0,>=0.23.1", "safetensors>=0.8.0"],
    ),
    "tokenizers 0.23.3": (">=3.10", ["huggingface-hub>=0.16.4,<3.0"]),
    "huggingface-hub 1.33.0": (">=3.10.0", []),
    "huggingface-hub 2.4.0": (">=3.10.0", []),
    "datasets 5.2.0": (">=3.10.0", ["numpy>=1.17", "huggingface-hub<3.0,>=1.31.0"]),
    "accelerate 1.15.0": (
        ">=3.10.0",
        ["numpy>=1.17", "torch>=2.0.0", "huggingface_hub>=0.21.0", "safetensors>=0.4.3"],
    ),
    "peft 0.21.2": (
        ">=3.10.0",
        [
            "numpy>=1.17",
            "torch>=1.13.0",
            "transformers",
            "accelerate>=0.21.0",
            "safetensors",
            "huggingface_hub>=0.25.0",
        ],
    ),
    "safetensors 0.8.0": (">=3.10", []),
    "lycoris-lora 4.1.3": (">=3.10", ["torch", "numpy", "safetensors"]),
    "bitsandbytes 0.50.2": (">=3.10", ["torch<3,>=2.4", "numpy>=1.17"]),
    "prodigyopt 1.1.2": (">=3.6", []),
    "schedulefree 1.4.1": (">=3.4", ["torch"]),
    "trl 1.16.0": (
        ">=3.11",
        [
            "accelerate>=1.10.1",
            "datasets>=4.7.0",
            "huggingface_hub>=0.34.0",
            "numpy>=1.26.0",
            "transformers>=4.56.2",
        ],
    ),
    "mkdocs-material 9.8.2": (">=3.11", []),
    "mkdocstrings 1.0.8": (">=3.11", []),
    "mkdocstrings-python 2.0.11": (">=3.11", ["mkdocstrings>=1.0.8"]),
    "gradio 6.31.0": (
        ">=3.10",
        ["numpy<3.0,>=1.0", "pandas<4.0,>=1.0", "pillow<13.0,>=8.0", "huggingface-hub<3.0,>=1.16.0"],
    ),
    "playwright 1.65.2": (">=3.10", []),
    "pytest 9.2.0": (">=3.10", []),
    "ruff 0.17.6": (">=3.7", []),
    "mypy 2.4.1": (">=3.10", []),
    "pyright 1.1.414": (">=3.7", []),
}


def lines() -> list[Requirement]:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    kept = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [Requirement(line) for line in kept if line]


def environment(python: str) -> dict[str, str]:
    return {
        "python_version": python, "python_full_version": f"{python}.1", "platform_system": "Linux",
        "sys_platform": "linux", "platform_machine": "x86_64", "extra": "",
    }  # fmt: skip


def applies(requirement: Requirement, python: str, extras=("",)) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate(environment(python) | {"extra": extra}) for extra in extras)


def constraints(python: str) -> dict[str, SpecifierSet]:
    found: dict[str, SpecifierSet] = {}
    for line in lines():
        if applies(line, python):
            name = canonicalize_name(line.name)
            assert name not in found, f"{name} has two lines for Python {python}"
            found[name] = line.specifier
    return found


def exact(specifier: SpecifierSet) -> str | None:
    versions = [s.version for s in specifier if s.operator == "=="]
    return versions[0] if versions else None


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def conflict(requirement: Requirement, pins: dict[str, SpecifierSet]) -> str | None:
    """Why a requirement cannot be met beside the constraints, as far as exact versions tell."""
    name = canonicalize_name(requirement.name)
    if name not in pins:
        return None
    pinned, wanted = exact(pins[name]), exact(requirement.specifier)
    if pinned is not None and not requirement.specifier.contains(pinned, prereleases=True):
        return f"constraints.txt has {name}{pins[name]}, and {requirement} is required"
    if wanted is not None and not pins[name].contains(wanted, prereleases=True):
        return f"constraints.txt has {name}{pins[name]}, and {requirement} is required"
    return None


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_pinned_goes_together(python):
    pins = constraints(python)
    for name, specifier in pins.items():
        version = exact(specifier)
        if version is None:
            continue
        assert f"{name} {version}" in WRITTEN, f"{name} {version} is pinned: write down what it requires"
        requires_python, requires = WRITTEN[f"{name} {version}"]
        assert SpecifierSet(requires_python).contains(f"{python}.1"), f"{name} {version} is not for Python {python}"
        for text in requires:
            requirement = Requirement(text)
            if applies(requirement, python):
                assert (reason := conflict(requirement, pins)) is None, f"{name} {version}, Python {python}: {reason}"


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_pinned_is_in_the_ranges_of_the_package(python):
    pins = constraints(python)
    extras = project()["optional-dependencies"]
    for text in [*project()["dependencies"], *(r for some in extras.values() for r in some)]:
        requirement = Requirement(text)
        if applies(requirement, python):
            assert (reason := conflict(requirement, pins)) is None, reason


def test_every_line_serves_a_supported_python():
    assert project()["requires-python"] == f">={PYTHONS[0]}"
    for line in lines():
        assert any(applies(line, python) for python in PYTHONS), line


@pytest.mark.parametrize(
    "line",
    ["triton==3.9.0", "triton>=3.8", "huggingface_hub==2.4.0", "transformers==5.23.0", "numpy==2.4.6"],
)
def test_the_check_sees_the_conflicts_there_have_been(line):
    """On Python 3.10 none of these can be met, the first two on no Python."""
    pins = constraints("3.10")
    requirement = Requirement(line)
    pins[canonicalize_name(requirement.name)] = requirement.specifier
    reasons = []
    for name, specifier in pins.items():
        requires_python, requires = WRITTEN.get(f"{name} {exact(specifier)}", ("", []))
        reasons += [] if SpecifierSet(requires_python).contains("3.10.1") else [name]
        reasons += [r for text in requires if (r := conflict(Requirement(text), pins))]
    assert reasons


def test_what_is_written_down_is_what_the_installed_packages_say():
    seen = 0
    for key, (requires_python, requires) in WRITTEN.items():
        name, version = key.split()
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if found.version.partition("+")[0] != version:  # 2.13.0+cpu is 2.13.0
            continue
        seen += 1
        assert SpecifierSet(found.metadata["Requires-Python"]) == SpecifierSet(requires_python), key
        names = {canonicalize_name(line.name) for line in lines()}
        says = {r for r in map(Requirement, found.requires or []) if applies(r, HERE)}
        says = {(canonicalize_name(r.name), r.specifier) for r in says if canonicalize_name(r.name) in names}
        wrote = {(canonicalize_name(r.name), r.specifier) for r in map(Requirement, requires)}
        if name == "torch" and not any(who == "triton" for who, _ in says):
            wrote = set()  # the CPU build
        assert says == wrote, key
    assert seen >= 10


def closure(*extras: str) -> set[str]:
    """All distributions that `pip install .[extras]` brings here, by the installed packages' own word."""
    own = {name: list(map(Requirement, r)) for name, r in project()["optional-dependencies"].items()}
    here = {canonicalize_name(d.name) for d in metadata.distributions()}
    found: set[str] = set()

    def add(requirement: Requirement, extras_of_the_asker=("",)) -> None:
        name = canonicalize_name(requirement.name)
        if not applies(requirement, HERE, extras_of_the_asker):
            return
        if name == "peft-krona":
            for extra in requirement.extras:
                for inner in own[extra]:
                    add(inner)
            return
        key = f"{name}{sorted(requirement.extras)}"
        if key in found:
            return
        found.update((key, name))
        if name in here:
            for text in metadata.requires(name) or []:
                add(Requirement(text), ("", *requirement.extras))

    for text in project()["dependencies"]:
        add(Requirement(text))
    add(Requirement(f"peft-krona[{','.join(extras)}]"))
    return found


def packages_distributions() -> dict[str, list[str]]:
    """importlib.metadata's, which in Python 3.10 sees only distributions with a top_level.txt."""
    found: dict[str, list[str]] = {}
    for distribution in metadata.distributions():
        named = (distribution.read_text("top_level.txt") or "").split()
        for top in named or {file.parts[0].removesuffix(".py") for file in distribution.files or []}:
            found.setdefault(top, []).append(distribution.name)
    return found


def test_the_demo_needs_no_more_than_it_uses():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "$(VENV)/.demo: pyproject.toml constraints.txt\n\t$(call install,.[demo])" in makefile
    demo = closure("demo")
    unused = {"pytest", "hypothesis", "ruff", "bitsandbytes", "lycoris-lora", "datasets", "matplotlib", "pyarrow"}
    if not any("triton" in r for r in metadata.requires("torch") or []):  # the CPU build
        unused.add("triton")
    assert not unused & demo, unused & demo
    assert unused - {"triton", "pyarrow"} <= closure("dev")

    # and no less: whatever the demo's files import at once is among it
    whose = packages_distributions()
    known = sys.stdlib_module_names | {"peft_krona", "dreambooth", "examples"}
    files = [ROOT / "examples" / "dreambooth_kron.py", *(ROOT / "examples" / "dreambooth").rglob("*.py")]
    files += (ROOT / "src").rglob("*.py")
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []
            for top in {name.split(".")[0] for name in names} - known:
                if file.parent.name != "triton":
                    owners = {canonicalize_name(d) for d in whose.get(top, [top])}  # 3.10 lists some not
                    assert owners & demo, f"{file.relative_to(ROOT)} imports {top}"
