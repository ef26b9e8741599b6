"""Make the tables of speed in README.md and docs/speed.md from the JSON of the benchmarks, one file per subject.

A new table is one function with `@speed_table(name, JSON, ...)` in a file of this folder.
"""

from importlib import import_module
from pkgutil import iter_modules

from speed_tables.registry import all_tables as all_tables
from speed_tables.registry import fill as fill

for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")
