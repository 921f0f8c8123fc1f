# SPDX-License-Identifier: Apache-2.0
"""Exceptions of peft_krona. Each is also the builtin that a caller would expect, so `except ValueError` works."""


class KronAError(Exception):
    """Base class of every error that peft_krona raises on purpose."""


class ConfigError(KronAError, ValueError):
    """A field of `KronAConfig` has a value that is not allowed, or fields contradict each other."""


class ConfigTypeError(ConfigError, TypeError):
    """A keyword that `KronAConfig` does not have, or something else where a `KronAConfig` is expected."""


class FactorError(KronAError, ValueError):
    """Requested Kronecker factors do not fit a layer's size."""


class ShapeError(KronAError, ValueError):
    """Tensors passed to an op or found in a file have shapes that do not belong together."""


class UnsupportedLayerError(KronAError, TypeError):
    """A target module is of a type that KronA cannot adapt."""


class BackendError(KronAError, RuntimeError):
    """The implementation that was asked for cannot run here."""


class MergeError(KronAError, ValueError):
    """An adapter cannot be merged or unmerged as asked."""


class FormatError(KronAError, ValueError):
    """A file or folder is not what its reader expects, or a format cannot hold what should be written."""


class RegistrationError(KronAError, RuntimeError):
    """PEFT already has something else registered under our name, prefix or type."""
