"""Name the files in an adapter's folder."""

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from hf_sparse.adapters.method_report import all_reports

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: The files of a checkpoint of transformers: its configuration, and its weights as one file or in shards with an index.
MODEL_CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-*.safetensors"  # a pattern

#: The measurements of the weights, and the record of their training.
EVALUATION, TRAINING = "eval.json", "finetune.json"

#: A line of JSON for every step of the last training; it is not published.
STEPS = "finetune.jsonl"

#: Pages for people: the card is published, the report and its folder of pictures are not.
CARD, REPORT, PICTURES = "README.md", "report.html", "figures"


def published_files() -> tuple[str, ...]:
    """List every file that a push may write or remove; others in a repository are left alone."""
    return (CONFIG, WEIGHTS, CARD, EVALUATION, TRAINING, *(report.figure for report in all_reports()))


def measurement_files(folder: Path) -> list[str]:
    """List what was measured of the adapter in a folder, and the report that shows it, as relative paths."""
    names = [EVALUATION, *(name for report in all_reports() for name in (report.figure, report.details_file)), REPORT]
    return [*(name for name in names if name is not None and (folder / name).exists()), *report_pictures(folder)]


def report_pictures(folder: Path, without: Collection[str] = ()) -> Iterator[str]:
    """Yield the relative paths of the pictures of the report in a folder, but for those of some names."""
    patterns = ("training", *(pattern for report in all_reports() for pattern in report.pictures))
    for path in sorted((folder / PICTURES).glob("*.png")):
        if path.stem not in without and any(fnmatchcase(path.stem, pattern) for pattern in patterns):
            yield f"{PICTURES}/{path.name}"
