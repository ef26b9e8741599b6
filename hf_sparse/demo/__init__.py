"""What the demo needs and the package carries: a small Llama of our own and text that every Python has."""

from pathlib import Path

#: Folder of the bundled checkpoint, an ordinary Hugging Face folder.
CHECKPOINT = Path(__file__).parent / "checkpoint"

#: Name of the bundled checkpoint in configurations and on the command line: a path would not be true elsewhere.
BASE_NAME = "demo"
