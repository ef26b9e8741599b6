"""What the scripts that measure a trained adapter on text are called with."""

import argparse
from pathlib import Path


def adapter_and_text(description: str | None) -> argparse.ArgumentParser:
    """ADAPTER, --text, --chunks, --length, --device and --output; add what a script has besides."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", default="0:4", help="START:STOP")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--output", type=Path, required=True)
    return parser
