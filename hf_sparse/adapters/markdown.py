"""Show values that strangers wrote in Markdown, as they are and on one line."""

import json
import re
from typing import Any

from markupsafe import Markup

# What Markdown and HTML read as markup, underscores within words apart; `$` begins formulas on the Hub.
_MARKUP = re.compile(r"[\\`*<>|~\[\]&$#]|(?<![^\W_])_|_(?![^\W_])")

# Control characters, and those that turn the direction of what follows.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def escape(value: Any) -> Markup:
    """Make text of a value that shows in Markdown as it is, on one line; a `Markup` is Markdown already.

    The templates show everything through this.

    >>> print(escape("Q4_1 | <b> *all*"))
    Q4_1 \\| \\<b\\> \\*all\\*
    """
    if isinstance(value, Markup):
        return value
    return Markup(_MARKUP.sub(r"\\\g<0>", _visible(value)))


def code(value: Any) -> Markup:
    """Show a value as code in Markdown, whatever is in it.

    >>> print(code("a`b.txt"))
    ``a`b.txt``
    """
    text = _visible(value).strip() or " "
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text[0] == "`" or text[-1] == "`" else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")


def _visible(value: Any) -> str:
    """Return the text of a value with a space in place of each run of invisible characters."""
    return _INVISIBLE.sub(" ", str(value).encode("utf-8", "replace").decode())


def python_string(text: str) -> Markup:
    """Write text as a string of Python in double quotes, on one line."""
    return Markup(json.dumps(text.encode("utf-8", "replace").decode(), ensure_ascii=False))
