# SPDX-License-Identifier: Apache-2.0
"""The package itself: which module may import which, and what works without optional packages."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_krona
from peft_krona import errors

SOURCE = Path(peft_krona.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# A module imports only what stands above its own line; those of one line do not know each other.
LAYERS = [
    {"errors", "choices", "_compat", "_version"},
    {"plan", "run"},  # arguments; what they do is imported when they run
    {"_command_line"},
    {"factors", "_register", "setting_names"},
    {"ops", "config", "targets", "rollback"},
    {"layers", "convert"},  # convert reads and writes files without the model half
    {"adapter_names"},
    {"merge", "combine", "param_groups", "share", "state_dict", "_diffusers"},
    {"hotswap"},
    {"model"},
    {"peft_krona"},  # __init__
    {"sources", "inspection"},
    {"pipelines", "skeleton"},
    {"suggest"},
    {"commands"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# The only places where these are imported; "" is anywhere
ALLOWED = {
    "diffusers": ("pipelines", "convert", "skeleton"),
    "triton": ("ops",),
    "bitsandbytes": (),
    "lycoris": (),
    "matplotlib": ("inspection",),
    "scipy": (),
}


def part(path: Path) -> str:
    """The module, or the subpackage, that a file belongs to."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return "peft_krona" if parts == ("__init__",) else parts[0]


def imports(path: Path):
    """(line, absolute dotted name, is it inside a function) of every import that runs; typing-only ones do not."""
    package = ["peft_krona", *path.relative_to(SOURCE).parent.parts]

    def walk(node, nested):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, nested) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    is_module = child.module is None or (module == "peft_krona" and alias.name in RANK)
                    yield child.lineno, f"{module}.{alias.name}" if is_module else module, nested
            yield from walk(child, nested or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    return list(walk(ast.parse(path.read_text(encoding="utf-8")), False))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_one_way(path):
    own = part(path)
    assert own in RANK, f"{own} has no place in the order of modules"
    for line, name, nested in imports(path):
        if not name.startswith("peft_krona"):
            continue
        target = ([*name.split("."), "peft_krona"])[1] if name != "peft_krona" else "peft_krona"
        if target == own and own in ("ops", "layers", "convert"):
            continue
        late = nested and own in ("__main__", "_diffusers", "plan")  # when they are called
        assert RANK[target] < RANK[own] or late, f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_third_party_imports(path):
    own = part(path)
    for line, name, nested in imports(path):
        top = name.split(".")[0]
        where = f"{path.name}:{line}"
        if own in ("ops", "factors", "choices", "errors", "_compat"):
            assert top not in ("peft", "transformers", "diffusers", "accelerate"), where
        if own in ("factors", "choices"):
            assert top != "torch", where
        if top in ALLOWED:
            assert own in ALLOWED[top], where
            beside = top == "diffusers" or (top == "triton" and "triton" in path.parts)
            assert nested or beside, f"{where}: not optional"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_file_names_its_license_and_has_a_docstring(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text))


def test_works_without_optional_packages():
    code = """
import sys
ABSENT = {"triton", "diffusers", "bitsandbytes", "matplotlib", "lycoris", "scipy", "hypothesis"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import tempfile, torch, peft_krona
import peft_krona.pipelines, peft_krona.convert, peft_krona.commands, peft_krona.__main__
from peft import PeftModel, get_peft_model
def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Conv2d(2, 2, 1))[:1]
model = get_peft_model(base(), peft_krona.KronAConfig(target_modules=["0"], a_out=4, a_in=2, init_weights=False))
x = torch.randn(3, 8)
model(x).sum().backward()
want = model.eval()(x)
with peft_krona.merged(model):
    torch.testing.assert_close(model(x), want)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    assert torch.equal(PeftModel.from_pretrained(base(), folder)(x), want)
assert not ABSENT & set(sys.modules)
print("fine")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "fine", result.stderr


def test_public_names():
    assert set(peft_krona.__all__) == {
        *("KronAConfig", "KronALayer", "KronAModel", "kron_linear", "krona_param_groups", "merged"),
        *("add_krona", "load_krona_weights", "save_krona_weights", "suggest_factors"),
    }
    assert all(getattr(peft_krona, name).__doc__ for name in peft_krona.__all__)
    assert set(peft_krona.__all__) <= set(dir(peft_krona))
    assert (SOURCE / "py.typed").exists()
    from peft_krona.convert import read_adapter
    from peft_krona.pipelines import add_krona, load_krona_weights, save_krona_weights

    assert all(f.__doc__ for f in (add_krona, load_krona_weights, save_krona_weights, read_adapter))
    assert peft_krona.add_krona is add_krona and peft_krona.load_krona_weights is load_krona_weights
    with pytest.raises(AttributeError, match=r"module 'peft_krona' has no attribute 'add_lora'"):
        _ = peft_krona.add_lora


def test_the_import_leaves_to_later_what_not_everybody_needs():
    code = """
import sys, peft_krona
late = {"diffusers", "peft_krona.pipelines", "peft_krona.convert"}
assert not late & set(sys.modules), late & set(sys.modules)
from peft_krona import add_krona
assert "peft_krona.pipelines" in sys.modules and "diffusers" not in sys.modules
print("fine", peft_krona.convert.read_adapter.__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "fine read_adapter", result.stderr


def test_version():
    pyproject = SOURCE.parents[1] / "pyproject.toml"
    if not pyproject.exists():
        pytest.skip("not run from a checkout")
    assert 'attr = "peft_krona._version.__version__"' in pyproject.read_text()
    citation = (SOURCE.parents[1] / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == peft_krona.__version__
    assert f"## {peft_krona.__version__}" in (SOURCE.parents[1] / "CHANGELOG.md").read_text()


def test_every_error_is_also_the_builtin_that_one_would_expect():
    for name, error in vars(errors).items():
        if isinstance(error, type) and error is not errors.KronAError and issubclass(error, Exception):
            assert issubclass(error, errors.KronAError), name
            assert issubclass(error, (ValueError, TypeError, RuntimeError)), name


# -- the op's functions ------------------------------------------------------------------------------------------------

# torch calls these with one flat list of arguments; the kernels take pointers and strides
FLAT = {"FusedAdd.forward", "KronAdd.forward", "fused", "fused_backward", "_"}
OPS = [path for path in FILES if part(path) == "ops"]


def functions(path: Path):
    """(dotted name, node) of every function of a file."""

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                if isinstance(child, ast.FunctionDef):
                    yield f"{prefix}{child.name}", child
                yield from walk(child, f"{prefix}{child.name}.")

    return list(walk(ast.parse(path.read_text(encoding="utf-8")), ""))


@pytest.mark.parametrize("path", [p for p in OPS if p.name != "kernels.py"], ids=lambda p: p.name)
def test_no_function_of_the_op_has_more_than_five_parameters(path):
    """Two tensors that change places in a long list raise nothing. What is known by keyword alone cannot."""
    for name, node in functions(path):
        positional = [a.arg for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
        assert len(positional) <= 5 or name in FLAT, f"{path.name}: {name}{tuple(positional)}"
        assert not node.args.kwonlyargs or name.startswith("kron_"), f"{path.name}: {name} is not a public op"


@pytest.mark.parametrize("path", [p for p in OPS if p.name != "kernels.py"], ids=lambda p: p.name)
def test_every_tensor_argument_of_the_op_has_its_shape(path):
    """In the docstring, behind its name: "x: (..., in)", "A (r, a_out, a_in)", or "tensor of any shape"."""
    for name, node in functions(path):
        if name in FLAT:
            continue
        text = ast.get_docstring(node) or ""
        for argument in node.args.args + node.args.kwonlyargs:
            if argument.annotation is None or "torch.Tensor" not in ast.unparse(argument.annotation):
                continue
            if "float | torch.Tensor" in ast.unparse(argument.annotation):
                continue  # s: a number, or as a tensor ()
            shape = rf"\b{argument.arg}\b[^.]*?(\(|any shape)"
            assert re.search(shape, text), f"{path.name}: {name} does not say {argument.arg}'s shape"
