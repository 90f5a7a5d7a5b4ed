"""Documents to token sequences of one length, packed without padding."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mxmoe_steps.data.sources import MixText, Source, documents
from mxmoe_steps.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 256  # documents tokenized at a time: a few sequences of a large set never cost the whole set


def sequences(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase", length: int, count: int | None, seed: int
) -> npt.NDArray[np.int64]:
    """Token ids [count, length]: documents shuffled by ``seed``, each ended by EOS, cut every ``length``.

    The tokenizer adds no special tokens of its own. ``count`` None takes every whole sequence there
    is. `UserError` if the text is too short.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no EOS token to put between documents; set eos_token in its config")
    order = np.random.default_rng(seed).permutation(len(texts))
    needed = None if count is None else count * length
    stream: list[int] = []
    for start in range(0, len(order), _BATCH):
        batch = [texts[i] for i in order[start : start + _BATCH]]
        for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            stream += ids
            stream.append(end)
        if needed is not None and len(stream) >= needed:
            break
    whole = len(stream) // length if count is None else count
    if whole == 0 or len(stream) < whole * length:
        wanted = f"{whole or 1} sequences of {length} need {(whole or 1) * length:,}"
        raise UserError(
            f"the text has {len(stream):,} tokens and {wanted}; lower `sequences` or `length`, or name more text"
        )
    return np.asarray(stream[: whole * length], dtype=np.int64).reshape(whole, length)


def load_sequences(
    sources: Mapping[str, Source],
    name: str,
    split: str,
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    count: int,
    seed: int,
) -> npt.NDArray[np.int64]:
    """Token ids [count, length] of the source called ``name``.

    Sequence i of a mix comes from its part i modulo the number of parts. `UserError` names the
    source; a mix may not hold another mix.
    """
    if name not in sources:
        raise UserError(f"text source {name!r} is not defined; known are {', '.join(sorted(sources))}")
    source = sources[name]
    if not isinstance(source, MixText):
        try:
            return sequences(documents(source, split), tokenizer, length, count, seed)
        except UserError as error:
            raise UserError(f"text source {name!r}, {split} split: {error}") from error
    parts = len(source.mix)
    rows = np.empty((count, length), dtype=np.int64)
    for offset, part in enumerate(source.mix):
        if isinstance(sources.get(part), MixText):
            raise UserError(f"text source {name!r}: its part {part!r} is a mix itself; name that mix's parts instead")
        share = len(range(offset, count, parts))
        if share:
            rows[offset::parts] = load_sequences(sources, part, split, tokenizer, length, share, seed)
    return rows
