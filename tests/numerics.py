# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of numbers as other CPUs would: `make test-numerics`, or `python tests/numerics.py SSE41 -k merge`.

What a product rounds to depends on the instructions that ATen, MKL, oneDNN and numpy's OpenBLAS choose and on how many
threads share it. Their variables make one machine take the ways of others (those that its CPU has): a bound that holds
on this CPU only turns red here. The first argument picks the settings that contain it; the rest is pytest's.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = [
    ("ATEN_CPU_CAPABILITY=default", 1), ("ATEN_CPU_CAPABILITY=avx2", 2),
    ("MKL_CBWR=COMPATIBLE", 2), ("MKL_CBWR=AVX2", 1),
    ("ONEDNN_MAX_CPU_ISA=SSE41", 1), ("ONEDNN_MAX_CPU_ISA=AVX2", 2),
    ("OPENBLAS_CORETYPE=Haswell", 2), ("OPENBLAS_CORETYPE=SkylakeX", 1), ("OPENBLAS_CORETYPE=Zen", 1),
]  # fmt: skip
# the rest of the suite is about names, files and messages
TESTS = """
    apply_A convert_clients convert_diffusekrona convert_export convert_fused convert_lokr convert_lora convert_nearest
    convert_wild float8 hotswap inspect layers measure merge merged_shares mixed native offload ops pipelines quantized
    surfaces transforms triton
""".split()


def main(pattern: str = "", *options: str) -> int:
    root = Path(__file__).resolve().parents[1]
    files = [str(root / "tests" / f"test_{name}.py") for name in TESTS]
    failed = []
    for setting, threads in SETTINGS:
        if pattern not in setting:
            continue
        environment = os.environ | {"TEST_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        environment |= [setting.split("=")]
        start = time.time()
        pytest = [sys.executable, "-m", "pytest", "-q", "--no-header", "--disable-warnings", *options, *files]
        code = subprocess.run(pytest, cwd=root, env=environment).returncode
        print(
            f"{setting}, {threads} threads: {'failed' if code else 'passed'} in {time.time() - start:.0f} s", flush=True
        )
        failed += [setting] * bool(code)
    print(f"failed with {', '.join(failed)}" if failed else "passed with all settings")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
