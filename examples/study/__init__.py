# SPDX-License-Identifier: Apache-2.0
"""Claims of the paper and of this project, measured on the shipped pipeline: a resumable grid of trainings."""
