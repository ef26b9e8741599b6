"""Show the `help` of a dataclass field, which the command line prints, as its description on the API page.

An extension of griffe, which reads the source for `make docs`; mkdocs.yml names it.
"""

import ast
from typing import Any

import griffe


class FieldHelp(griffe.Extension):
    """Take the description of a field from `field(metadata={"help": ...})`."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Give an attribute without a docstring the help that its field has."""
        if attr.docstring is None and str(attr.value).startswith("field("):
            for node in ast.walk(ast.parse(str(attr.value), mode="eval")):
                if isinstance(node, ast.Dict):
                    texts = dict(zip(map(ast.unparse, filter(None, node.keys)), node.values, strict=True))
                    if isinstance(text := texts.get("'help'"), ast.Constant):
                        attr.docstring = griffe.Docstring(str(text.value).replace("[", r"\["), parent=attr)
