"""calibrate: what quantizing each linear block under one scheme does to the output of its layer.

For one quantizer and one scheme, writes
  SCHEME.parquet      losses per layer, expert and block (gate, up, down)
  SCHEME.safetensors  the quantized weights themselves, packed: `quantize` picks from them

A MoE layer's output is a routed sum, so the change that one block of one expert causes is the change of
that expert's output on its own tokens times their router weights: no other expert is computed. All
arithmetic is float32 (float64 Hessians), before the residual addition.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from mxmoe_steps.arguments import add_runtime, parser_for, start_torch
from mxmoe_steps.atomic import atomic_path, canonical_json
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.schemes import BLOCKS, SHARED, parse_scheme

QUANTIZERS = ("rtn", "gptq")


def expert_losses(
    tokens: Any, scale: Any, gradient: Any, weights: Any, quantized: Any, activation: Any, scheme: Any
) -> Any:
    """Losses of one expert, float64 [3, 2]: per block the summed squared change and the Fisher sum.

    ``tokens`` [n, H] inputs of the expert, ``scale`` [n] factor of its output (router weight),
    ``gradient`` [n, H] or None, ``weights`` and ``quantized``: float32 (gate, up, down).
    Only one block is quantized at a time (MxMoE, section 3.2); activations enter it as its kernel
    would see them.
    """
    import torch

    from mxmoe_steps.quantizers.grid import quantize_activations

    gate, up, down = weights
    sums = torch.zeros(3, 2, dtype=torch.float64, device=tokens.device)
    chunk = 1 << 15  # tokens at a time: bounds the memory of the shared expert of a large model
    for x, w, g in zip(
        tokens.split(chunk),
        scale.split(chunk),
        (gradient if gradient is not None else tokens).split(chunk),
        strict=True,
    ):
        gated, raised = activation(x @ gate.T), x @ up.T
        hidden = gated * raised
        seen = quantize_activations(x, scheme)
        changes = (
            (activation(seen @ quantized[0].T) * raised - hidden) @ down.T,
            (gated * (seen @ quantized[1].T) - hidden) @ down.T,
            quantize_activations(hidden, scheme) @ quantized[2].T - hidden @ down.T,
        )
        for block, change in enumerate(changes):
            change *= w.unsqueeze(-1)
            sums[block, 0] += torch.linalg.vector_norm(change, dim=-1).double().square().sum()
            if gradient is not None:
                sums[block, 1] += 0.5 * torch.linalg.vecdot(change, g).double().square().sum()
    return sums


class LayerInputs:
    """What `capture` wrote for one layer, on the compute device."""

    def __init__(self, path: Path, device: Any) -> None:
        from safetensors.torch import load_file

        if not path.is_file():
            raise UserError(f"{path}: no such captured layer; run the capture step for this model")
        tensors = {name: tensor.to(device) for name, tensor in load_file(path).items()}
        self.hidden = tensors["hidden"].float()
        self.ids = tensors["ids"].long()
        self.weights = tensors["weights"]
        self.shared = tensors.get("shared")
        self.gradient = tensors.get("gradient")

    def of(self, expert: int) -> tuple[Any, Any, Any]:
        """Tokens [n, H], output factors [n] and gradients [n, H] (or None) of one expert."""
        if expert == SHARED:
            return self.hidden, self.shared, self.gradient
        token, slot = (self.ids == expert).nonzero(as_tuple=True)
        gradient = None if self.gradient is None else self.gradient[token]
        return self.hidden[token], self.weights[token, slot], gradient


def quantize_experts(
    inputs: LayerInputs, experts: list[int], weights: Any, activation: Any, scheme: Any, quantizer: str, damping: float
) -> list[Any]:
    """`QuantizedWeight` stacks (gate, up, down) of experts of one shape; ``weights``: three [E, N, K]."""
    from mxmoe_steps.quantizers.gptq import gptq
    from mxmoe_steps.quantizers.grid import round_to_nearest

    if quantizer == "rtn":
        return [round_to_nearest(block, scheme) for block in weights]
    entering, inner = _hessians(inputs, experts, weights, activation)
    hessians = (entering, entering, inner)
    return [gptq(block, hessian, scheme, damping) for block, hessian in zip(weights, hessians, strict=True)]


def _hessians(inputs: LayerInputs, experts: list[int], weights: Any, activation: Any) -> tuple[Any, Any]:
    """Hessians of what enters gate and up, and of what enters down."""
    import torch

    from mxmoe_steps.quantizers.gptq import Hessians

    gate, up, _ = weights
    entering, inner, tokens = [], [], []
    for index, expert in enumerate(experts):
        x, scale, _ = inputs.of(expert)
        hidden = activation(x @ gate[index].T) * (x @ up[index].T)
        entering.append(_second_moment(x * scale.unsqueeze(-1)))
        inner.append(_second_moment(hidden * scale.unsqueeze(-1)))
        tokens.append(len(x))
    counts = torch.tensor(tokens, device=gate.device)
    pooled = torch.stack(inner).sum(0) / counts.sum().clamp_min(1)
    every = _second_moment(inputs.hidden) / len(inputs.hidden)
    return Hessians(torch.stack(entering), counts, every), Hessians(torch.stack(inner), counts, pooled)


def _second_moment(x: Any) -> Any:
    """float64 [K, K] of x [n, K]: float32 products over short runs of tokens, float64 sums."""
    return sum((part.T @ part).double() for part in x.split(4096)) if len(x) else (x.T @ x).double()


def calibrate_layer(folder: Any, layer: int, inputs: LayerInputs, args: argparse.Namespace) -> tuple[list[Any], Any]:
    """Rows of `tables.LOSSES` (tuples in column order) and packed tensors of one layer."""
    from mxmoe_steps.models.weights import activation_function, read_block

    scheme = parse_scheme(args.scheme)
    activation = activation_function(folder)
    rows, packed = [], {}
    routed = list(range(folder.experts))
    for experts in [routed] + ([[SHARED]] if inputs.shared is not None else []):
        weights = [read_block(folder, layer, experts, block).to(inputs.hidden.device) for block in BLOCKS]
        stacks = quantize_experts(inputs, experts, weights, activation, scheme, args.quantizer, args.damping)
        for index, expert in enumerate(experts):
            tokens, scale, gradient = inputs.of(expert)
            one = [stack[index] for stack in stacks]
            restored = [weight.dequantize() for weight in one]
            own = [block[index] for block in weights]
            sums = expert_losses(tokens, scale, gradient, own, restored, activation, scheme)
            sums[:, 1] /= len(inputs.hidden)
            if not sums.isfinite().all():
                raise UserError(f"layer {layer}, expert {expert}: the loss under {scheme} is not finite")
            for number, block in enumerate(BLOCKS):
                out_features, in_features = own[number].shape
                few = args.quantizer != "rtn" and len(tokens) < in_features
                row = (layer, expert, block, out_features, in_features, scheme.bits(in_features), len(tokens))
                rows.append((*row, *sums[number].tolist(), few))
                for part, tensor in one[number].tensors().items():
                    packed[f"{layer}.{expert}.{block}.{part}"] = tensor.cpu()
    return rows, packed


def calibrate(args: argparse.Namespace) -> None:
    """Calibrate every MoE layer under one scheme."""
    from safetensors.torch import save_file

    from mxmoe_steps.models.families import open_model, resolve_model
    from mxmoe_steps.models.loading import resolve_device
    from mxmoe_steps.tables import LOSSES, write_table

    scheme = parse_scheme(args.scheme)
    if scheme.is_original:
        raise UserError("w16a16 is the original and has no loss; leave it out of calibration")
    start_torch(args)
    folder = open_model(resolve_model(args.model))
    device = resolve_device(args.device)
    rows: list[Any] = []
    packed: dict[str, Any] = {}
    for layer in folder.moe_layers:
        inputs = LayerInputs(Path(args.capture) / f"layer-{layer:03d}.safetensors", device)
        layer_rows, layer_packed = calibrate_layer(folder, layer, inputs, args)
        rows += layer_rows
        packed |= layer_packed
        few = sum(row[-1] for row in layer_rows)
        note = f", {few} blocks with fewer tokens than input features" if few else ""
        print(f"calibrate {args.quantizer} {scheme}: layer {layer}{note}", file=sys.stderr, flush=True)
    facts = {"quantizer": args.quantizer, "scheme": scheme.name, "fisher": inputs.gradient is not None}
    columns = dict(zip(LOSSES.schema.names, map(list, zip(*rows, strict=True)), strict=True))
    out = Path(args.out)
    with atomic_path(out / f"{scheme}.safetensors") as temporary:
        save_file(packed, temporary, metadata={"mxmoe": canonical_json(facts)})
    write_table(LOSSES, out / f"{scheme}.parquet", columns, facts)


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", required=True, help="local checkpoint folder or hub id")
    parser.add_argument("--capture", required=True, help="folder that capture wrote")
    parser.add_argument("--quantizer", required=True, choices=QUANTIZERS)
    parser.add_argument("--scheme", required=True, help="for example w4a16 or w8a8_fp8")
    parser.add_argument("--damping", type=float, default=0.01, help="GPTQ: fraction of the mean Hessian diagonal")
    add_runtime(parser)
    parser.add_argument("--out", required=True, help="folder to write")
    calibrate(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
