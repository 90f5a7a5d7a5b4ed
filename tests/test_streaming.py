"""Models run one layer at a time: what transformers computes whole, resumed or in ranges; and bad weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import capture_tokens, make_checkpoint
from transformers import AutoModelForCausalLM

from mxmoe_steps.models.families import FAMILIES, open_model
from mxmoe_steps.models.streaming import StreamedModel, layer_path

RUNTIME = {"device": "cpu", "threads": 1, "seed": 0, "batch": 3}
WINDOWS: dict[str, dict[str, Any]] = {  # attention that differs from layer to layer
    "mixtral": {"sliding_window": 8},
    "phimoe": {"sliding_window": 8},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    "qwen3_moe": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
}


def whole_model(checkpoint: Path, tokens: torch.Tensor) -> tuple[dict[int, dict[str, Any]], list[torch.Tensor]]:
    """transformers' own forward and backward of everything: captured tensors by layer, and log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).requires_grad_(False)
    folder = open_model(checkpoint)
    found: dict[int, dict[str, Any]] = {layer: {} for layer in folder.moe_layers}
    for layer in folder.moe_layers:
        moe = model.model.layers[layer].mlp

        def enter(_module: Any, args: Any, layer: int = layer) -> None:
            for name, tensor in zip(("hidden", "ids", "weights"), args, strict=True):
                found[layer].setdefault(name, []).append(tensor.detach())

        def leave(_module: Any, _args: Any, output: Any, layer: int = layer) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            probe = torch.zeros_like(first, requires_grad=True)
            found[layer].setdefault("probes", []).append(probe)
            return (first + probe, *output[1:]) if isinstance(output, tuple) else first + probe

        moe.experts.register_forward_pre_hook(enter)
        moe.register_forward_hook(leave)
    generator = torch.Generator().manual_seed(2)
    results = []
    for run in tokens.split(2):
        log_probs = torch.log_softmax(model(run, use_cache=False).logits.float(), -1).flatten(0, 1)
        labels = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        (-log_probs.gather(-1, labels).sum()).backward()
        results.append(log_probs.detach())
    for tensors in found.values():
        tensors["gradient"] = [probe.grad.flatten(0, 1) for probe in tensors.pop("probes")]
    return {layer: {name: torch.cat(v) for name, v in found[layer].items()} for layer in found}, results


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_streamed_model_equals_the_whole_one(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "model", **WINDOWS.get(family, {}))
    tokens = torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(1))
    expected, log_probs = whole_model(tmp_path / "model", tokens)
    got = capture_tokens(tmp_path / "model", tokens, tmp_path / "capture")
    assert sorted(got) == sorted(expected)
    for layer, tensors in expected.items():
        assert torch.equal(got[layer]["hidden"], tensors["hidden"])
        assert torch.equal(got[layer]["ids"].long(), tensors["ids"])
        assert torch.equal(got[layer]["weights"], tensors["weights"].float())
        # the same sums in the same order, but for the head, where autograd meets [n, V] in one piece or another
        scale = tensors["gradient"].abs().max()
        assert scale > 0
        assert torch.allclose(got[layer]["gradient"], tensors["gradient"], rtol=1e-4, atol=1e-6 * float(scale))

    model = StreamedModel(tmp_path / "model", "float32", "cpu")
    with torch.no_grad():
        with model.loaded("model.embed_tokens"):
            hidden = model.embed(tokens[:2])
        for layer in range(model.layers):
            with model.loaded(layer_path(layer)):
                hidden = model.run_layer(layer, hidden)
        with model.head():
            assert torch.equal(model.log_probs(model.decoder.norm(hidden.flatten(0, 1))), log_probs[0])
    assert all(parameter.is_meta for parameter in model.model.parameters())
