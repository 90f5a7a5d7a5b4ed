"""What a family's own decoder and head do around its layers, heard from them: nothing of it is written again here.

Masks, positions, rotary embeddings and scaled embeddings come from the decoder, which runs with layers that only
listen; scaled and capped logits come from the class that owns the head, which runs on hidden states made elsewhere.
"""

from typing import Any

import torch
from torch import nn

Call = tuple[list[Any], dict[str, Any]]  # arguments by place and by name


@torch.no_grad()
def heard_calls(decoder: Any, norm: Any, inputs: dict[str, torch.Tensor], returned: tuple[Any, ...]) -> list[Call]:
    """How ``decoder`` called each of its layers on ``inputs``, each of which gave back what it got.

    ``norm``: the final one, which does so, too. ``returned``: what a layer gives back behind hidden states, if any.
    """
    calls: list[Call] = []

    def listen(hidden_states: torch.Tensor, *others: Any, **named: Any) -> Any:
        calls.append(([hidden_states, *others], named))
        return (hidden_states, *returned) if returned else hidden_states

    quiet = [norm, *decoder.layers]
    norm.forward = lambda hidden: hidden
    for layer in decoder.layers:
        layer.forward = listen
    try:
        decoder(**inputs, use_cache=False)
    finally:
        for module in quiet:
            del module.forward
    return calls


def logits_of(owner: Any, hidden: torch.Tensor) -> torch.Tensor:
    """[n, V] of final hidden states [n, H]: what the head's ``owner`` makes of them when ``owner.model`` is done."""
    from transformers.modeling_outputs import BaseModelOutput

    class Done(BaseModelOutput):
        """What a decoder may say besides, it does not."""

        def __getattr__(self, name: str) -> None:
            return None

    model: nn.Module = owner.model
    model.forward = lambda *_, **__: Done(last_hidden_state=hidden.unsqueeze(0))  # type: ignore[method-assign]
    try:
        logits: torch.Tensor = owner(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits.squeeze(0)
    finally:
        del model.forward
    return logits
