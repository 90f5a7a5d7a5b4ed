"""KL divergence of the embedded model from the original, by kind of text, on text that nothing else has read.

Shared by the studies of allocation, tuning and peers. Text: sequences that neither training, calibration nor the demo's
evaluation read: of the four domains of the demo's calibration text, Python source and English of another kind (the help
pages of Python's `pydoc`; both from the standard library). Weight-only schemes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxmoe_steps.data.parsing import parse_sources
from mxmoe_steps.data.tokens import load_sequences, sequences
from mxmoe_steps.models.families import open_model
from mxmoe_steps.schemes import BLOCKS, SHARED
from mxmoe_steps.tuning.reading import PackedFolder

Weights = Mapping[tuple[int, int, str], torch.Tensor]  # by layer, expert and block, [N, K]

DOMAINS = {"english": "wiki-en", "french": "wiki-fr", "spanish": "wiki-es", "code": "code"}
LENGTH, EVALUATED = 512, 6  # tokens of a sequence, and sequences of the test split that the demo evaluates
STANDARD = Path(json.__file__).parents[1]  # Python's standard library
LIBRARY = ("argparse", "tarfile", "inspect", "ast")  # modules of it that are evaluated


class Model:
    """The embedded model with its expert weights replaced, and the original's log-probabilities of held-out text."""

    def __init__(self, path: str, count: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)
        self.tokens = held_out(AutoTokenizer.from_pretrained(path), count)
        self.original = {text: self._log_probs(tokens).half() for text, tokens in self.tokens.items()}

    def _log_probs(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(tokens).logits[:, :-1].log_softmax(-1)

    def kl(self, weights: Weights, texts: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Text, of all or of ``texts``, -> nats per token of every sequence with these weights in the experts."""
        load_weights(self.model, weights)
        found = {}
        for text in texts or self.tokens:
            log_q, log_p = self._log_probs(self.tokens[text]), self.original[text].float()
            found[text] = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1).double().numpy()
        return found


def load_weights(model: torch.nn.Module, weights: Weights) -> None:
    """Put these weights in place of the blocks' own."""
    for (layer, expert, block), weight in weights.items():
        moe = model.model.layers[layer].mlp
        if expert == SHARED:
            getattr(moe.shared_expert, f"{block}_proj").weight.copy_(weight)
        elif block == "down":
            moe.experts.down_proj[expert].copy_(weight)
        else:
            moe.experts.gate_up_proj[expert].chunk(2)[BLOCKS.index(block)].copy_(weight)


def held_out(tokenizer: Any, count: int) -> dict[str, torch.Tensor]:
    """Text -> tokens int64 [count, LENGTH]."""
    sources = parse_sources({name: {"package": package} for name, package in DOMAINS.items()})
    found = {}
    for name in DOMAINS:
        tokens = load_sequences(sources, name, "test", tokenizer, LENGTH, EVALUATED + count, seed=0)
        found[name] = torch.from_numpy(tokens[EVALUATED:])
    code = [(STANDARD / f"{name}.py").read_text(encoding="utf-8") for name in LIBRARY]
    for name, texts in (("Python", code), ("pydoc", [topics[key] for key in sorted(topics)])):
        found[name] = torch.from_numpy(sequences(texts, tokenizer, LENGTH, count, seed=0))
    return found


def packed_weights(checkpoint: str | Path, model: str) -> Weights:
    """Weights of the blocks of a checkpoint that `quantize` or `tune` wrote of ``model``."""
    folder = open_model(model)
    packed = PackedFolder(open_model(checkpoint), folder)
    return {
        (layer, expert, block): packed.stack(layer, [expert], block, torch.device("cpu"))[0].dequantize()
        for layer in folder.moe_layers
        for expert in folder.expert_ids()
        for block in BLOCKS
    }


def row_of(found: dict[str, np.ndarray], base: dict[str, np.ndarray], **names: Any) -> dict[str, Any]:
    """KL of every text and of all; of all the difference to ``base`` and its paired error; the worst ratio to it."""
    each = {text: float(values.mean()) for text, values in found.items()}
    ratios = {text: value / float(base[text].mean()) for text, value in each.items()}
    differences = [found[text] - base[text] for text in found]
    variance = sum(one.var(ddof=1) / len(one) for one in differences)  # of texts, which are given and not drawn
    worst = max(ratios, key=lambda text: ratios[text])
    return {
        **names, "all": float(np.mean(list(each.values()))), "difference": float(np.mean(differences)),
        "+-": variance**0.5 / len(differences), "worst": f"{worst} {ratios[worst]:.3f}", **each,
    }  # fmt: skip
