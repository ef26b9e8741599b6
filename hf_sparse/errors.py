"""Define errors that a user can act on. Each is also the built-in error that transformers and PEFT would raise."""


class HfSparseError(Exception):
    """Group the errors below, so that one `except` catches them all."""


class UnsupportedModelError(HfSparseError, ValueError):
    """Report that the model's family, or the way it was loaded, has no patch."""


class AdapterMismatchError(HfSparseError, ValueError):
    """Report that an adapter was made for another base model."""


class WeightsError(HfSparseError, ValueError):
    """Report tensors that no adapter has: other names, shapes or dtypes, or numbers that are not finite."""


class CompatibilityError(HfSparseError, ImportError):
    """Report that an installed library no longer has what this one builds on."""


class DataError(HfSparseError, ValueError):
    """Report data that cannot train or evaluate what was asked."""


class HubError(HfSparseError, OSError):
    """Report that the Hub refused, or that files of a repository are missing or damaged."""


class BusyError(HfSparseError, BlockingIOError):
    """Report that another run holds the folder."""
