"""Command-line arguments that several steps share. Stdlib only: ``--help`` must be instant."""

import argparse


def parser_for(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the step's module docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--made-from", metavar="DIGEST", help="what decides the result, for the record beside it (made_from.py)"
    )
    return parser


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
    parser.add_argument("--sequences", type=int, default=32, help="sequences per text (default 32)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default 512)")


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Where and how to compute."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 or auto (default cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; part of the result's bytes (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="sequences per forward pass (default 8)")


def add_borders(parser: argparse.ArgumentParser) -> None:
    """Where text waits between layers."""
    parser.add_argument(
        "--borders",
        metavar="DIR",
        help="folder of hidden states at layer borders, removed at the end (default: OUT.borders)",
    )
