# SPDX-License-Identifier: Apache-2.0
"""Helpers of examples/dreambooth_kron.py: what the training loop calls, one subject per file."""

import logging

# PEFT imports bitsandbytes where it is installed, which then tells of kernels that it has not found: nothing of ours
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class TrainingError(Exception):
    """Something that the user can put right; the message says what was expected, what was found and what to do."""


class DivergedError(TrainingError):
    """The loss, the weights or an image has values that are not finite."""


def one_line(error: BaseException) -> str:
    """The message of another library, to be quoted in ours."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
