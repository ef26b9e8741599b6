"""Fill the tables of documents in from the JSON of the benchmarks: no number in a table is typed by hand.

    python benchmarks/tables.py --fill docs/speed.md README.md --figure docs/speed.png

A document marks the place of a table: everything between `<!-- table: NAME -->` and `<!-- end -->` is replaced. The
words around it belong to the document. The tables, and the JSON that each is made of, are in `speed_tables`. Where
several JSON files of one benchmark are given, the first one counts, and each next one adds the cells that those before
it lack.
"""

import argparse
from pathlib import Path

from speed_tables import all_tables, fill
from speed_tables.attention import draw
from speed_tables.registry import RESULTS

from hf_sparse.atomic_files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the JSON")
    parser.add_argument(
        "--fill", type=Path, nargs="*", default=[], help="Markdown files whose marked tables are replaced"
    )
    parser.add_argument("--figure", type=Path, help="the PNG to write")
    options = parser.parse_args()
    tables = all_tables(options.results)
    if options.figure:
        draw(options.figure, options.results)
    for document in options.fill:
        write_text(document, fill(document.read_text("utf-8"), tables))
    if not options.fill:
        print("\n".join(f"{name}:\n\n{text}" for name, text in tables.items()))


if __name__ == "__main__":
    main()
