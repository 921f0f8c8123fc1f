# SPDX-License-Identifier: Apache-2.0
"""The fused kernels for NVIDIA GPUs. Only `library` can be imported without the package triton."""
