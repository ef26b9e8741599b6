"""Say in one line why the Hub could not be reached or read, and what to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # httpx's or httpx2's, whichever this huggingface_hub uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from hf_sparse.access_tokens import one_line, scrub
from hf_sparse.errors import HfSparseError, HubError

_LONGEST = 500  # characters of a message that others wrote


@contextmanager
def explained(action: str, left: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn every failure to reach the Hub or to read from it into one `HubError`: what to do, and what is left.

    Clients and their storages fail with exceptions of many kinds, RuntimeError among them, and new versions add others.
    """
    try:
        yield
    except (HfSparseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        scrub(error)
        raise HubError(f"{action}: {_advice(error)}{left()}") from error


def _advice(error: BaseException) -> str:
    """Say in one line what failed and what to do."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return f"{_advice(error.__cause__)}; it is not in the cache either"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or this token may not see it (`hf auth login`)"
    if isinstance(error, HfHubHTTPError):
        return _advice_on_status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HTTPError):
        return f"the Hub cannot be reached ({short_line(error)}): check the network"
    message = short_line(error).removesuffix(".") or type(error).__name__
    if not isinstance(error, OSError | ValueError) and error.__cause__ is not None:  # says what failed, but not why
        return f"{message}: {_advice(error.__cause__)}"
    return message


def _advice_on_status(error: HfHubHTTPError) -> str:
    """Say what a status of the Hub means, and what to do."""
    status = error.response.status_code
    # Files lie elsewhere, under addresses that are signed for a while: what it refuses is not the token.
    request = getattr(error.response, "_request", None)  # the property raises where there was none
    at_hub = request is None or str(request.url).startswith(constants.ENDPOINT)
    failed = f"the {'Hub' if at_hub else 'storage of the Hub'} failed ({status}): try again later"
    known = {
        401: "the token is not valid (401): run `hf auth login`, or pass token=",
        403: "this token may not do that (403): check the owner's name and that the token may write",
        404: "the Hub does not find it (404): see that the repository still exists",
        409: "the name is taken, or another change got in between (409): try again",
        412: "another change got in between (412): try again",
    }
    refused = {
        413: "a file is larger than it takes (413)",
        429: "there were too many requests (429): wait, then try again",
    }
    if status >= 500:
        return failed
    if status in refused:
        return refused[status]
    if not at_hub:
        return f"the storage of the Hub refused ({status}): try again"
    return known.get(status, short_line(error))


def short_line(error: object) -> str:
    """Return the message of an exception in one line, without secrets, and cut where it is very long."""
    text = one_line(error)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
