"""Render model cards from values by name. Tests take what they need of this file with `runpy`."""

from dataclasses import fields
from typing import Any

from hf_sparse.adapters.card import AdapterFacts, Measurements, Page, render


def card_text(config: Any, **values: Any) -> str:
    """Render the card of a configuration; each value goes to the record that has a field of its name."""
    values = {"config": config, "base_model": None, "parameters": 1} | values
    records = [
        kind(**{field.name: values.pop(field.name) for field in fields(kind) if field.name in values})
        for kind in (AdapterFacts, Page, Measurements)
    ]
    assert not values
    return render(*records)
