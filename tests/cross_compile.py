# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for GPUs that are not here; run as a script, it prints what every variant takes."""

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from peft_krona.ops.plan import MANY, Target, make_plan

ARCHITECTURES = (80, 90, 100)
# (r, a_out, a_in, b_out, b_in): the paper's 1280-wide layer, 640 at (64, 8), 2048 wide, A first, square, odd sizes
SHAPES = {
    "1280 (64,4)": (1, 64, 4, 20, 320),
    "640 (64,8)": (1, 64, 8, 10, 80),
    "2048 to 1280 (64,8)": (1, 64, 8, 20, 256),
    "1280 (4,64)": (1, 4, 64, 320, 20),
    "1280 (32,32) r=2": (2, 32, 32, 40, 40),
    "odd r=3": (3, 7, 5, 3, 9),
}


class Resources(NamedTuple):
    """Of a compiled kernel: registers a thread, bytes of stack a thread (spills), bytes of shared memory a program.

    token_lanes: over how many tokens the lanes of a warp are spread where tiles of three dimensions are stored.
    """

    registers: int
    stack: int
    shared: int
    token_lanes: int


def compile_for(
    kernel: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, architecture: int, add: bool
) -> Resources:
    """Compile "forward" (`add`: to a base) or "backward" (`add`: to a given dX) for `sm_<architecture>`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peft_krona.ops.triton import kernels, launch

    function = getattr(kernels, f"{kernel}_kernel")
    r, a_out, a_in, b_out, b_in = shape
    plan = make_plan((r, a_out, a_in), (r, b_out, b_in), layout, None, Target("cuda", dtype, MANY))
    constants = {"z": launch.sizes(plan, dtype.itemsize)}
    if kernel == "backward":
        constants |= {"ADD": add, "NEED_X": True, "NEED_FACTORS": True}
    elif not add:
        constants["base"] = None
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    others = dict.fromkeys(("T", "chunk", "x_t", "b_t", "dx_t"), "i32") | {"scale": "fp32"}
    others |= dict.fromkeys(("A", "B", "parts"), "*fp32")  # PEFT keeps factors in fp32
    signature = {n: "constexpr" if n in constants else others.get(n, pointer) for n in function.arg_names}
    aligned = {  # as a launch finds them: whole tensors, rows of a multiple of 16 values
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(function.arg_names)
        if name not in ("T", "chunk", "scale") and signature[name] != "constexpr"
    }
    options = {"num_warps": launch.WARPS, "num_stages": launch.STAGES}
    if kernel == "forward":
        options["maxnreg"] = launch.forward_registers(constants["z"], dtype.itemsize)
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Resources(int(registers), int(stack), compiled.metadata.shared, _token_lanes(compiled.asm["ttgir"]))


def _token_lanes(ttgir: str) -> int:
    from peft_krona.ops.triton import kernels

    layouts = set(re.findall(r"tt\.store .*tensor<\d+x\d+x\d+x!tt\.ptr<\w+>, (#\w+)>", ttgir))
    tokens = 0 if kernels.TOKENS_FIRST else 1
    lanes = [re.search(rf"{name} = .*threadsPerWarp = \[(\d+), (\d+), ", ttgir).groups() for name in layouts]
    return max(int(each[tokens]) for each in lanes)


class NoDevice:
    """A Triton driver for a GPU that is not here: launches compile, count, and compute nothing."""

    def __init__(self, architecture: int) -> None:
        self.launched: list[str] = []
        self.architecture = architecture
        self.utils = self

    # what Triton asks a driver for
    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launched.append(metadata.name)

    # and its `utils`
    def load_binary(self, *arguments) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}


if __name__ == "__main__":
    print(
        "| kernel | shape | layout | dtype | add | arch | registers | stack (B) | shared (B) | token lanes |\n"
        + "|---" * 10
        + "|"
    )
    for row in itertools.product(
        ("forward", "backward"),
        SHAPES,
        ("kron", "diffusekrona"),
        (torch.bfloat16, torch.float16, torch.float32),
        (True, False),
        ARCHITECTURES,
    ):
        kernel, shape, layout, dtype, add, architecture = row
        taken = compile_for(kernel, SHAPES[shape], layout, dtype, architecture, add)
        cells = (kernel, shape, layout, str(dtype)[6:], add, f"sm_{architecture}", *taken)
        print("|", " | ".join(map(str, cells)), "|", flush=True)
