"""capture: what enters every MoE layer on the calibration text.

Runs the model once and writes one file per layer, layer-NNN.safetensors:
  hidden    [T, H]  input of the experts, in the model's precision
  ids       [T, k]  experts of each token, int16
  weights   [T, k]  router weights, float32
  shared    [T]     factor of the shared expert's output, float32 (families that have one)
  gradient  [T, H]  gradient of the loss with respect to the layer's output, float32 (unless --no-gradient)

`calibrate` reads nothing else of the model's activations, so every scheme, quantizer and layer can be
calibrated as a job of its own. The loss is the negative log-likelihood of next tokens drawn from the
model itself: the squared gradient then is the Fisher information of its predictions, and
1/2 (gradient . change)^2 estimates the KL divergence that a change of the layer's output causes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from mxmoe_steps.arguments import add_model, add_runtime, add_text, parser_for, start_torch
from mxmoe_steps.atomic import atomic_path, canonical_json
from mxmoe_steps.errors import UserError, run_cli


def capture_batch(folder: Any, model: Any, tokens: Any, gradient: bool, generator: Any) -> dict[int, dict[str, Any]]:
    """Captured tensors per layer for ``tokens`` int64 [B, L]; ``generator`` draws the labels."""
    import torch

    from mxmoe_steps.models.loading import expert_hooks, moe_module, shared_weights

    captured: dict[int, dict[str, Any]] = {}
    probes: dict[int, Any] = {}
    handles = []

    def seen(layer: int, routing: Any) -> None:
        hidden, ids, weights = routing
        captured[layer] = {
            "hidden": hidden.detach(),
            "ids": ids.to(torch.int16),
            "weights": weights.detach().float(),
        }

    for layer in folder.moe_layers if gradient else []:

        def add_probe(_module: Any, _args: Any, output: Any, layer: int = layer) -> Any:
            probes[layer] = torch.zeros_like(output, requires_grad=True)
            return output + probes[layer]

        handles.append(moe_module(folder, model, layer).register_forward_hook(add_probe))
    try:
        with torch.set_grad_enabled(gradient), expert_hooks(folder, model, seen):
            if gradient:
                logits = model(input_ids=tokens, use_cache=False).logits.float()
            else:
                model.model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if gradient:
        log_probs = torch.log_softmax(logits.flatten(0, 1), dim=-1)
        labels = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator).to(log_probs.device)
        loss = -log_probs.gather(-1, labels).sum()
        for layer, grad in zip(probes, torch.autograd.grad(loss, list(probes.values())), strict=True):
            captured[layer]["gradient"] = grad.flatten(0, 1).float()
    for layer, tensors in captured.items():
        if folder.family.shared is not None:
            with torch.no_grad():
                tensors["shared"] = shared_weights(folder, model, layer, tensors["hidden"]).float()
        captured[layer] = {name: tensor.cpu() for name, tensor in tensors.items()}
    return captured


def capture(args: argparse.Namespace) -> None:
    """Capture every MoE layer of the model on one text."""
    import torch
    from safetensors.torch import save_file

    from mxmoe_steps.data.reading import read_texts
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.loading import load_model

    start_torch(args)
    path = resolve_model(args.model)
    tokens = read_texts(args, path, [args.text], "calibration")[args.text]
    folder, model = load_model(path, args.dtype, args.device, args.trust_remote_code)
    generator = torch.Generator().manual_seed(args.seed)
    batches = []
    for number, chunk in enumerate(torch.from_numpy(tokens).split(args.batch)):
        done = min((number + 1) * args.batch, args.sequences)
        batches.append(capture_batch(folder, model, chunk.to(model.device), not args.no_gradient, generator))
        print(f"capture {args.text}: {done} of {args.sequences} sequences", file=sys.stderr, flush=True)
    facts = {"text": args.text, "sequences": args.sequences, "length": args.length}
    for layer in folder.moe_layers:
        tensors = {name: torch.cat([batch[layer][name] for batch in batches]) for name in batches[0][layer]}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(f"{path}: layer {layer}: {name} holds NaN or infinity on text {args.text!r}")
        with atomic_path(Path(args.out) / f"layer-{layer:03d}.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"mxmoe": canonical_json(facts | {"layer": layer})})


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    add_model(parser)
    add_text(parser, several=False)
    add_runtime(parser)
    parser.add_argument("--no-gradient", action="store_true", help="skip the backward pass (no fisher losses)")
    parser.add_argument("--out", required=True, help="folder to write")
    capture(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
