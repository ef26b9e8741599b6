"""Name the checkpoint that the package carries: a small Llama of our own, an ordinary Hugging Face folder."""

from pathlib import Path

#: Folder of the bundled checkpoint.
CHECKPOINT = Path(__file__).parent / "demo" / "checkpoint"

#: Name of the bundled checkpoint in configurations and on the command line: a path would not be true elsewhere.
BASE_NAME = "demo"
