"""Sampled inference steps: how many rows, one per routed token, each expert of each layer gets in a forward step."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.errors import UserError
from mxmoe_steps.facts import TrafficFacts
from mxmoe_steps.gating import SWIGLU, Gating, of_variant
from mxmoe_steps.models.raw import TensorFile
from mxmoe_steps.tables import TRAFFIC, read_table
from mxmoe_steps.timing.shapes import LayerShape

DECODE_TOKENS = 256  # auto: a step of at most this many tokens is one token each of many sequences
_FIX = "run the trace step again"


@dataclass(frozen=True)
class Traffic:
    """Rows of each routed expert in sampled steps of ``tokens`` tokens.

    ``rows`` int64 [layers, steps, experts]; ``weight`` float64, same shape: the share of steps that each
    sample stands for. A step's expectation is the sum of weight x cost(rows) over the steps axis. ``gating``: of the
    model's experts.
    """

    layers: tuple[int, ...]
    tokens: int
    rows: NDArray[np.int64]
    weight: NDArray[np.float64]
    model: str = ""  # fingerprint, empty if made up
    gating: Gating = SWIGLU


class Routing:
    """The experts of every token that `trace` wrote into ``folder``; `UserError` where its files are damaged."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder
        table, self.facts = read_table(TRAFFIC, Path(folder) / "traffic.parquet")
        self._file = TensorFile(Path(folder) / "routing.safetensors", _FIX)
        if self._file.facts(TrafficFacts) != self.facts:
            raise self._file.error("is of another trace than traffic.parquet")
        layers, texts, experts = (self.facts[key] for key in ("layers", "texts", "experts"))
        keys = itertools.product(sorted(set(texts)), sorted(set(layers)), range(experts))
        if list(zip(*(table.column(name).to_pylist() for name in TRAFFIC.keys), strict=True)) != list(keys):
            raise UserError(
                f"{folder}/traffic.parquet: its rows are not those of its texts, layers and experts; {_FIX}"
            )
        self._tokens = table.column("tokens").to_numpy().reshape(len(texts), len(layers), experts)

    def check_texts(self, texts: Sequence[str]) -> None:
        """`UserError` for a text that was not traced."""
        unknown = sorted(set(texts) - set(self.facts["texts"]))
        if unknown:
            raise UserError(
                f"{self._folder}: no text {unknown[0]!r} in this trace; it has {', '.join(self.facts['texts'])}"
            )

    def expert_ids(self, text: str, layer: int) -> NDArray[np.int16]:
        """int16 [tokens, top-k] of one text and layer; `UserError` where they contradict the table."""
        facts = self.facts
        shape = (facts["sequences"], facts["length"], facts["top_k"])
        tensor = self._file.tensor(f"{text}/{layer}", ["I16"], shape)
        expert_ids = np.frombuffer(tensor.read(), np.int16).reshape(-1, shape[-1])
        tokens = self._tokens[facts["texts"].index(text), facts["layers"].index(layer)]
        known = expert_ids.min() >= 0 and expert_ids.max() < len(tokens)
        if not known or (np.bincount(expert_ids.ravel(), minlength=len(tokens)) != tokens).any():
            raise self._file.error(f"{text}/{layer}: the expert ids do not add up to traffic.parquet")
        return expert_ids


def sample_positions(
    kind: str, tokens: int, sequences: int, length: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Flat positions [tokens] in a trace of ``sequences`` x ``length`` tokens that form one step.

    decode: single tokens anywhere; prefill: contiguous windows of sequences. With replacement only
    where the trace is too short.
    """
    if kind == "decode":
        return generator.choice(sequences * length, tokens, replace=tokens > sequences * length)
    windows = -(-tokens // length)
    sequence = generator.choice(sequences, windows, replace=windows > sequences)
    last = tokens - (windows - 1) * length
    starts = np.zeros(windows, np.int64)
    starts[-1] = generator.integers(length - last + 1)
    flat = (sequence * length + starts)[:, None] + np.arange(length)
    return flat.ravel()[:tokens]


def sample_steps(
    facts: dict[str, Any], texts: Sequence[str], tokens: int, kind: str, steps: int, seed: int
) -> list[tuple[str, NDArray[np.int64]]]:
    """Text and positions, as of `sample_positions`, of ``steps`` steps of ``tokens`` tokens; texts take turns.

    ``kind`` auto goes by ``tokens``. Fewer steps are the first of more.
    """
    if tokens < 1:
        raise UserError(f"tokens per step must be at least 1, not {tokens}")
    if kind == "auto":
        kind = "decode" if tokens <= DECODE_TOKENS else "prefill"
    generator = np.random.default_rng(seed)
    turns = [texts[step % len(texts)] for step in range(steps)]
    return [(text, sample_positions(kind, tokens, facts["sequences"], facts["length"], generator)) for text in turns]


def sample_traffic(
    folder: str | Path, texts: list[str], tokens: int, kind: str = "auto", steps: int = 16, seed: int = 0
) -> Traffic:
    """Sample ``steps`` forward steps of ``tokens`` tokens from the routing that `trace` wrote.

    Texts are all by default; ``kind`` of the steps: prefill or decode, see `sample_steps`. An expert that no sampled
    step reaches gets one row in a fraction of a step that follows its traffic in the whole trace, so no expert is free.
    `UserError` for a text that was not traced.
    """
    routing = Routing(folder)
    facts = routing.facts
    texts = texts or facts["texts"]
    routing.check_texts(texts)
    layers, experts = tuple(facts["layers"]), facts["experts"]
    positions = sample_steps(facts, texts, tokens, kind, steps, seed)
    rows = np.zeros((len(layers), steps, experts), np.int64)
    seen = np.zeros((len(layers), experts))  # tokens of each expert in all the texts
    for index, layer in enumerate(layers):
        expert_ids = {text: routing.expert_ids(text, layer) for text in texts}
        for text in texts:
            seen[index] += np.bincount(expert_ids[text].ravel(), minlength=experts)
        for step, (text, places) in enumerate(positions):
            rows[index, step] = np.bincount(expert_ids[text][places].ravel(), minlength=experts)
    expected = tokens * np.maximum(seen, 0.5) / (facts["sequences"] * facts["length"] * len(texts))
    gating = of_variant(facts["activation"]) if "activation" in facts else SWIGLU
    return replace(_with_rare_experts(layers, tokens, rows, expected), model=facts["model"], gating=gating)


def _with_rare_experts(
    layers: tuple[int, ...], tokens: int, rows: NDArray[np.int64], expected: NDArray[np.float64]
) -> Traffic:
    """Traffic of sampled ``rows``, and where no step reaches an expert one row in a share of a step.

    ``expected`` [layers, experts]: rows of every expert in a step, on average.
    """
    steps = rows.shape[1]
    weight = np.full(rows.shape, 1 / steps)
    layer, expert = np.nonzero(rows.sum(1) == 0)
    rows[layer, 0, expert] = 1
    weight[layer, 0, expert] = np.minimum(1 / steps, expected[layer, expert])
    return Traffic(layers, tokens, rows, weight)


def routed_rows(
    logits: NDArray[np.float64], tokens: int, top_k: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Rows of each expert, int64 [experts], when every token takes the top-k of Gumbel noise over ``logits``."""
    noisy = logits + generator.gumbel(size=(tokens, len(logits)))
    expert_ids = np.argpartition(-noisy, top_k - 1, 1)[:, :top_k]
    return np.bincount(expert_ids.ravel(), minlength=len(logits))


def skewed_traffic(
    shape: LayerShape, layers: tuple[int, ...], tokens: int, skew: float, steps: int, seed: int
) -> Traffic:
    """Made-up steps of a layer ``shape``: routed expert e has popularity 1 / (e + 1)^skew, in every layer."""
    generator = np.random.default_rng(seed)
    logits = -skew * np.log(np.arange(shape.experts) + 1.0)
    rows = np.array([[routed_rows(logits, tokens, shape.top_k, generator) for _ in range(steps)] for _ in layers])
    popularity = np.exp(logits) / np.exp(logits).sum()
    expected = np.tile(tokens * shape.top_k * popularity, (len(layers), 1))
    return _with_rare_experts(layers, tokens, rows, expected)
