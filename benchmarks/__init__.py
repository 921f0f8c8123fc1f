# SPDX-License-Identifier: Apache-2.0
"""Speed and memory against PEFT LoRA, PEFT LoKr, LyCORIS and the frozen base: `python -m benchmarks.run --help`."""
