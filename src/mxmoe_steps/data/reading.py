"""The token sequences that a step's command line asks for."""

import argparse
from pathlib import Path
from typing import Any

from mxmoe_steps.data.parsing import parse_sources
from mxmoe_steps.data.tokens import load_sequences
from mxmoe_steps.models.loading import load_tokenizer


def read_texts(args: argparse.Namespace, model: Path, texts: list[str], split: str) -> dict[str, Any]:
    """Tokens int64 [sequences, length] of every text, by the model's tokenizer; see `arguments.add_text`."""
    sources = parse_sources(args.sources)
    tokenizer = load_tokenizer(model, args.trust_remote_code)
    return {
        text: load_sequences(sources, text, split, tokenizer, args.length, args.sequences, args.seed) for text in texts
    }
