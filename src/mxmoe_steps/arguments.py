"""Command-line arguments that several steps share, and their types. Stdlib only: ``--help`` must be instant."""

import argparse
import math
import os
from pathlib import Path


def parser_for(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the step's module docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--made-from", metavar="DIGEST", help="what decides the result, for the record beside it (made_from.py)"
    )
    return parser


def _whole(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 30 and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1, 2**31 - 1)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0, 2**63 - 1)


def finite(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return value


def zero_to_one(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def file_to_write(text: str) -> str:
    """A file that can be written, known before anything is computed."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give the name of a file")
    _check_place(Path(text))
    return text


def folder_to_write(text: str) -> str:
    """A folder that can be written, known before anything is computed."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; give the name of a folder")
    _check_place(Path(text))
    return text


def _check_place(path: Path) -> None:
    """`ArgumentTypeError` unless ``path`` can be made where it is to be."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise argparse.ArgumentTypeError(f"{above} is a file, so {path} cannot be made")
    if not os.access(above, os.W_OK):
        raise argparse.ArgumentTypeError(f"no permission to write in {above}")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, in which precision."""
    parser.add_argument("--model", required=True, help="local checkpoint folder or hub id")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "auto"])
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def add_text(parser: argparse.ArgumentParser, several: bool) -> None:
    """Which text, and how many sequences of which length."""
    parser.add_argument("--sources", required=True, help="JSON object: name -> text source")
    if several:
        parser.add_argument("--texts", nargs="+", required=True, metavar="NAME", help="sources to use")
    else:
        parser.add_argument("--text", required=True, metavar="NAME", help="source to use")
    parser.add_argument("--sequences", type=positive, default=32, help="sequences per text (default 32)")
    parser.add_argument("--length", type=positive, default=512, help="tokens per sequence (default 512)")


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Where and how to compute."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 or auto (default cpu)")
    parser.add_argument(
        "--threads", type=positive, default=1, help="CPU threads; part of the result's bytes (default 1)"
    )
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--batch", type=positive, default=8, help="sequences per forward pass (default 8)")


def add_borders(parser: argparse.ArgumentParser) -> None:
    """Where text waits between layers."""
    parser.add_argument(
        "--borders",
        type=folder_to_write,
        metavar="DIR",
        help="folder of hidden states at layer borders, removed at the end (default: OUT.borders)",
    )
