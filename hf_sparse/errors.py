"""Errors that a user can act on. Each is also the built-in error that code around transformers and PEFT expects."""


class HfSparseError(Exception):
    """Base of the errors below."""


class UnsupportedModelError(HfSparseError, ValueError):
    """The model's family, or the way it was loaded, has no patch."""


class AdapterMismatchError(HfSparseError, ValueError):
    """An adapter was made for another base model."""


class WeightsError(HfSparseError, ValueError):
    """Tensors that cannot be those of an adapter: other names, shapes or dtypes, or numbers that are not finite."""


class CompatibilityError(HfSparseError, ImportError):
    """An installed library no longer has what this one builds on."""


class DataError(HfSparseError, ValueError):
    """The data cannot train or evaluate what was asked."""


class HubError(HfSparseError, OSError):
    """The Hub refused, or files of a repository are missing or damaged."""


class BusyError(HfSparseError, BlockingIOError):
    """Another run holds the folder."""
