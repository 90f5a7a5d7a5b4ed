"""The token sequences that a step's command line asks for, checked: text of this model, and nothing degenerate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mxmoe_steps.data.parsing import parse_sources
from mxmoe_steps.data.tokens import load_sequences
from mxmoe_steps.errors import UserError
from mxmoe_steps.extensions import load
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.loading import load_tokenizer
from mxmoe_steps.options.shared import TextThroughModel

_MOST_UNKNOWN = 0.05  # of the tokens
_MOST_OF_ONE = 0.5  # of the tokens; in prose, code, tables and JSON none makes up more than 0.17
_WINDOW = 16  # tokens in a row
_LEAST_DISTINCT = 0.01  # of the windows; 1 of prose, 0.7 of Python code, 0.2 of lists of numbers in JSON


class TextReader:
    """Reads the text sources of a command line with a model's tokenizer; see `options.shared`.

    `UserError` for a folder without tokenizer, or with that of another model.
    """

    def __init__(self, model: Path, sources: Mapping[str, Any], seed: int, trust_remote_code: bool) -> None:
        self.sources, self.seed = parse_sources(sources), seed
        self.tokenizer = load_tokenizer(model, trust_remote_code)
        check_tokenizer(self.tokenizer, open_model(model).vocabulary, model)

    def read(self, text: str, split: str, sequences: int, length: int) -> npt.NDArray[np.int64]:
        """Tokens int64 [sequences, length]; `UserError` names the text that cannot be read or is degenerate."""
        tokens = load_sequences(self.sources, text, split, self.tokenizer, length, sequences, self.seed)
        check_tokens(tokens, self.tokenizer, f"text source {text!r}, {split} split")
        return tokens


def read_texts(
    options: TextThroughModel, model: Path, texts: list[str], split: str
) -> dict[str, npt.NDArray[np.int64]]:
    """Tokens int64 [sequences, length] of every text that a step asks for."""
    load(options.extensions)
    reader = TextReader(model, options.sources, options.seed, options.trust_remote_code)
    return {text: reader.read(text, split, options.sequences, options.length) for text in texts}


def check_tokenizer(tokenizer: Any, rows: int, model: Path) -> None:
    """`UserError` unless the tokenizer has a vocabulary and its ids are below ``rows``, those of the embedding."""
    vocabulary = tokenizer.get_vocab()
    if len(set(vocabulary.values()) - set(tokenizer.all_special_ids)) < 2:  # what transformers makes of no files
        raise UserError(
            f"{model}: the tokenizer has no vocabulary; copy its files (tokenizer.json, or vocab.json and merges.txt,"
            " or tokenizer.model, and tokenizer_config.json) from the original model"
        )
    name, largest = max(vocabulary.items(), key=lambda item: item[1])
    if largest >= rows:
        raise UserError(
            f"{model}: the tokenizer's token {name!r} is number {largest}, and the embedding has {rows} rows; it is the"
            " tokenizer of another model, copy that of this one"
        )


def check_tokens(tokens: npt.NDArray[np.int64], tokenizer: Any, where: str) -> None:
    """`UserError` for tokens [S, L] that say little of a model: unknown, of one kind, or the same again and again."""
    flat = tokens.flatten()
    unknown = tokenizer.unk_token_id
    named = unknown is not None and unknown != tokenizer.eos_token_id  # some have one token for both
    share = float((flat == unknown).mean()) if named else 0.0
    if share > _MOST_UNKNOWN:
        raise UserError(
            f"{where}: {share:.0%} of the tokens are {tokenizer.unk_token}, unknown to the tokenizer; is the text in a"
            " language of the model, and the tokenizer its own?"
        )
    token_ids, counts = np.unique(flat, return_counts=True)
    if counts.max() > _MOST_OF_ONE * flat.size:
        token = tokenizer.convert_ids_to_tokens(int(token_ids[counts.argmax()]))
        raise UserError(
            f"{where}: {counts.max() / flat.size:.0%} of the tokens are {token!r}; name text that is more varied, and"
            " check that the tokenizer's files are complete"
        )
    windows = np.lib.stride_tricks.sliding_window_view(flat, min(_WINDOW, flat.size))
    distinct = len(np.unique(windows, axis=0)) / len(windows)
    if len(windows) > _WINDOW and distinct < _LEAST_DISTINCT:
        raise UserError(
            f"{where}: the same tokens come again and again (only {distinct:.1%} of the runs of {_WINDOW} tokens are"
            " new); name text that is more varied"
        )
