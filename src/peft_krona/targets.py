# SPDX-License-Identifier: Apache-2.0
"""The names of the layers that are adapted where `KronAConfig.target_modules` is None, as data."""

DIFFUSERS_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
