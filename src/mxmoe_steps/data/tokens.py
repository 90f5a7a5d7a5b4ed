"""Documents to token sequences of one length, packed without padding."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mxmoe_steps.data.files import Document
from mxmoe_steps.data.sources import MixText, TextSource, documents
from mxmoe_steps.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 256  # documents tokenized at a time: a few sequences of a large set never cost the whole set
_CHARACTERS = 8  # of a document's beginning that are tokenized per token that is needed; more if they are too few
_LEAST_CHARACTERS = 4096
_UNSETTLED = 64  # last tokens of such a beginning, which the rest of the document could change
# Before chat templates that tell the date: the same text gives the same tokens on any day
_SAME_DAY = "{%- macro strftime_now(format) %}2026-01-01{% endmacro -%}"


def leading_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special tokens that the tokenizer itself puts before a text, such as BOS; often none."""
    bare, full = (
        tokenizer(["a"], add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"][0]
        for special in (False, True)
    )
    starts = range(len(full) - len(bare) + 1)
    return next((list(full[:start]) for start in starts if full[start : start + len(bare)] == bare), [])


def sequences(
    texts: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", length: int, count: int | None, seed: int
) -> npt.NDArray[np.int64]:
    """Token ids [count, length]: documents shuffled by ``seed``, each ended by EOS, cut to fill sequences.

    A sequence begins with the special tokens that the tokenizer puts before a text (BOS), where it does; inside
    there are none. Chats pass through the tokenizer's chat template. ``count`` None takes every whole sequence there
    is. `UserError` if the text is too short.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token to put between documents; set eos_token in its config")
    leading = leading_tokens(tokenizer)
    body = length - len(leading)
    if body < 1:
        raise UserError(f"sequences of {length} tokens have no room beside {leading} at their start; raise `length`")
    order = np.random.default_rng(seed).permutation(len(texts))
    stream = _stream([texts[i] for i in order], tokenizer, leading, sys.maxsize if count is None else count * body)
    whole = len(stream) // body if count is None else count
    if whole == 0 or len(stream) < whole * body:
        wanted = f"{whole or 1} sequences of {length} need {(whole or 1) * body:,}"
        raise UserError(
            f"the text has {len(stream):,} tokens and {wanted}; lower `sequences` or `length`, or name more text"
        )
    rows = np.asarray(stream[: whole * body], dtype=np.int64).reshape(whole, body)
    return np.concatenate([np.tile(np.asarray(leading, np.int64), (whole, 1)), rows], axis=1)


def _stream(found: list[Document], tokenizer: "PreTrainedTokenizerBase", leading: list[int], needed: int) -> list[int]:
    """Token ids of documents one after the other: at least ``needed``, if there are so many."""
    end = tokenizer.eos_token_id
    stream: list[int] = []
    position = 0
    while position < len(found) and len(stream) < needed:
        missing = needed - len(stream)
        limit = max(_CHARACTERS * missing, _LEAST_CHARACTERS)
        start = position
        batch: list[str] = []
        while position < len(found) and len(batch) < _BATCH and sum(map(len, batch)) < limit:
            batch.append(_text(found[position], tokenizer))
            position += 1
        encoded = _encode([text[:limit] for text in batch], tokenizer)
        while limit < len(batch[-1]) and len(encoded[-1]) < missing + _UNSETTLED:  # the others are shorter
            limit *= 2
            encoded[-1:] = _encode([batch[-1][:limit]], tokenizer)
        if limit < len(batch[-1]):
            del encoded[-1][-_UNSETTLED:]
        for document, token_ids in zip(found[start:position], encoded, strict=True):
            stream += token_ids[len(leading) :] if token_ids[: len(leading)] == leading else token_ids
            whole = isinstance(document, str)  # a template may go on after EOS
            closed = token_ids[-1:] == [end] if whole else end in token_ids
            if not closed:
                stream.append(end)
    return stream


def _encode(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _text(document: Document, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A document as text; `UserError` for a chat that the tokenizer's template does not take."""
    if isinstance(document, str):
        return document
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template for chats; name a column of text, or add the template")
    try:
        template = _SAME_DAY + tokenizer.get_chat_template()
        return str(tokenizer.apply_chat_template(document, chat_template=template, tokenize=False))
    except Exception as error:  # whatever the template's code raises
        raise UserError(f"the tokenizer's chat template does not take a chat: {error}") from error


def load_sequences(
    sources: Mapping[str, TextSource],
    name: str,
    split: str,
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    count: int,
    seed: int,
) -> npt.NDArray[np.int64]:
    """Token ids [count, length] of the source called ``name``.

    Sequence i of a mix comes from its member i modulo the number of members. `UserError` names the
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
    members = len(source.mix)
    rows = np.empty((count, length), dtype=np.int64)
    for offset, member in enumerate(source.mix):
        if isinstance(sources.get(member), MixText):
            raise UserError(
                f"text source {name!r}: its member {member!r} is a mix itself; name that mix's members instead"
            )
        share = len(range(offset, count, members))
        if share:
            rows[offset::members] = load_sequences(sources, member, split, tokenizer, length, share, seed)
    return rows
