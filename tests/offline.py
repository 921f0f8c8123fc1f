# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for GPUs that are not here. `python tests/offline.py` prints what every variant takes."""

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from peft_krona.ops.torch_impl import Plan

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
    """Of a compiled kernel: registers a thread, bytes of stack a thread (spills), bytes of shared memory a program."""

    registers: int
    stack: int
    shared: int


def compile_offline(
    kernel: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, architecture: int, add: bool
) -> Resources:
    """Compile "forward" (`add`: to a base) or "backward" (`add`: to a given dX) for `sm_<architecture>`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peft_krona.ops import triton_kernels

    function = getattr(triton_kernels, f"{kernel}_kernel")
    r, a_out, a_in, b_out, b_in = shape
    A, B = torch.empty(r, a_out, a_in, dtype=dtype), torch.empty(r, b_out, b_in, dtype=dtype)
    plan = Plan.of(A, B, layout)
    mA, mB = plan._replace(layout="kron").matrices(A, B)
    constants = triton_kernels.constants(plan, mA, mB)
    constants |= {"ADD": add, "NEED_X": True, "NEED_FACTORS": True} if kernel == "backward" else {}
    if kernel == "forward" and not add:
        constants["base"] = None
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    scalars = {"T": "i32", "chunk": "i32", "x_t": "i32", "b_t": "i32", "dx_t": "i32", "d_factors": "*fp32"}
    signature = {n: "constexpr" if n in constants else scalars.get(n, pointer) for n in function.arg_names}
    aligned = {  # as a launch finds them: whole tensors, rows of a multiple of 16 values
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(function.arg_names)
        if name not in ("T", "chunk") and signature[name] != "constexpr"
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": triton_kernels.WARPS, "num_stages": triton_kernels.STAGES},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Resources(int(registers), int(stack), compiled.metadata.shared)


if __name__ == "__main__":
    print("| kernel | shape | layout | dtype | add | arch | registers | stack (B) | shared (B) |\n" + "|---" * 9 + "|")
    for row in itertools.product(
        ("forward", "backward"),
        SHAPES,
        ("kron", "diffusekrona"),
        (torch.bfloat16, torch.float16, torch.float32),
        (True, False),
        ARCHITECTURES,
    ):
        kernel, shape, layout, dtype, add, architecture = row
        taken = compile_offline(kernel, SHAPES[shape], layout, dtype, architecture, add)
        cells = (kernel, shape, layout, str(dtype)[6:], add, f"sm_{architecture}", *taken)
        print("|", " | ".join(map(str, cells)), "|", flush=True)
