"""Check access tokens of the Hub before they are used, and take them out of every message."""

import os
import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants, get_token

from hf_sparse.errors import HubError

#: Stands where something secret stood.
HIDDEN = "***"

_SHORTEST = 6  # characters; shorter strings are no tokens, and would be found in ordinary words

# Patterns of credentials, and the text that replaces them. Addresses of storage are signed in their query.
_SECRETS = (
    (re.compile(r"(?i)(bearer\s+)[^'\"\r\n]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf|api_org)_(?:jwt_|oauth_)?[A-Za-z0-9]{16,}[\w.-]*"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?"), HIDDEN),
    (re.compile(r"(\w+://)[^/\s@'\"]+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"<>]+"), rf"\1?{HIDDEN}"),
)

# Tokens that were passed in this process.
_passed: set[str] = set()


def check_token(token: str | bool | None) -> str | bool | None:
    """Strip a token and check that it can be sent, before it is used.

    A client that is given a token with a line end in it fails with a message that holds the token.

    Args:
        token: the token, `True` or `None` for the saved one, `False` for none.

    Returns:
        The token without spaces and line ends around it; other values unchanged.

    Raises:
        HubError: the token is empty or holds what no token can hold, or the saved one cannot be read. The message does
            not show it.
        TypeError: neither a string, a bool nor `None`.
    """
    if token is False:
        return token
    if token is None or token is True:
        try:
            saved = get_token()
        except Exception as error:
            scrub(error)
            reason = redact(" ".join(str(error).split()))
            raise HubError(f"the saved token (HF_TOKEN, or of `hf auth login`) cannot be read: {reason}") from error
        if saved is not None:
            _check_characters(saved, "the saved token (HF_TOKEN, or of `hf auth login`)")
        return token
    if not isinstance(token, str):
        raise TypeError(f"token must be a string, True, False or None, got {type(token).__name__}")
    _passed.add(token.strip())
    _check_characters(token.strip(), "the token that was passed")
    return token.strip()


def redact(text: str) -> str:
    """Take tokens, passwords in addresses and signatures of addresses out of a text.

    >>> redact("Illegal header value b'Bearer hf_abc'")
    "Illegal header value b'Bearer ***'"
    >>> redact("403 for https://storage.example/file?X-Amz-Signature=abc")
    '403 for https://storage.example/file?***'
    """
    for secret in sorted(_known(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern, rest in _SECRETS:
        text = pattern.sub(rest, text)
    return text


def one_line(error: object) -> str:
    """Return the message of an exception in one line, without secrets."""
    return redact(" ".join(str(error).split()))


def scrub(error: BaseException) -> None:
    """Redact an exception, and those that led to it, in place: a traceback prints them all."""
    waiting: list[object] = [error]
    done: set[int] = set()
    while waiting:
        link = waiting.pop()
        if not isinstance(link, BaseException) or id(link) in done:
            continue
        done.add(id(link))
        waiting += [link.__cause__, link.__context__, *link.args]
        link.args = tuple(redact(part) if isinstance(part, str) else part for part in link.args)
        if isinstance(link, OSError) and isinstance(link.strerror, str):
            link.strerror = redact(link.strerror)


def _check_characters(token: str, what: str) -> None:
    if not token:
        raise HubError(f"{what} is empty: expected one such as hf_..., or run `hf auth login`")
    for place, character in enumerate(token):
        if not "!" <= character <= "~":
            raise HubError(
                f"{what} cannot be one: expected visible ASCII characters without spaces, got another as number "
                f"{place + 1} of {len(token)}"
            )


def _known() -> set[str]:
    """Return the tokens that were passed or are saved."""
    saved = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    with suppress(OSError, ValueError):
        saved.append(Path(constants.HF_TOKEN_PATH).read_text("utf-8"))
    return {token.strip() for token in (*_passed, *saved) if len(token.strip()) >= _SHORTEST}
