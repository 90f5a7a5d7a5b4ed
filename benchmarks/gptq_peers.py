"""Our GPTQ beside llm-compressor's and GPTQModel's: error of every expert block at equal bits, the same Hessians.

    snakemake --cores 2 --until capture               # the demo's captured layers
    pip install llmcompressor gptqmodel               # in an environment of its own
    python benchmarks/gptq_peers.py

Hessians come from the first three quarters of every domain's captured tokens. The error tr(dW H dW^T) is the squared
change of the layer's output that a block causes (gate and up: of the block's output), measured on those tokens and on
the last quarter; the table has its sum over all blocks relative to round-to-nearest with our grid.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file

from mxmoe_steps.calibration.inputs import LayerInputs
from mxmoe_steps.calibration.weights import add_moments
from mxmoe_steps.models.families import ModelFolder, open_model
from mxmoe_steps.models.weights import read_block, read_gating
from mxmoe_steps.quantizers.gptq import gptq
from mxmoe_steps.quantizers.grid import round_to_nearest
from mxmoe_steps.quantizers.hessians import Hessians
from mxmoe_steps.quantizers.names import DAMPING
from mxmoe_steps.schemes import BLOCKS, Scheme, parse_scheme

Quantize = Callable[[torch.Tensor, Hessians, Scheme], torch.Tensor]  # weights [E, N, K] to their quantized values


def llm_compressor(order: str | None) -> Quantize:
    """llm-compressor's GPTQ with min-max ranges; ``order``: its ``actorder``."""

    def quantize(weight: torch.Tensor, hessians: Hessians, scheme: Scheme) -> torch.Tensor:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.utils import calculate_qparams
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

        options = {"num_bits": scheme.weight_bits, "symmetric": False, "strategy": "group", "group_size": scheme.group}
        wanted = QuantizationArgs(**options, actorder=order)
        groups = weight.unflatten(-1, (-1, scheme.group_size(weight.shape[-1])))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), wanted)
        moments = (hessians.sums / hessians.tokens.clamp_min(1).view(-1, 1, 1)).float()
        return quantize_weight(weight.clone(), moments, scale, zero, None, wanted)[0]

    return quantize


def gptq_model(weight: torch.Tensor, hessians: Hessians, scheme: Scheme) -> torch.Tensor:
    """GPTQModel's GPTQ with activation order and static groups, its default ranges."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    options = {"sym": False, "desc_act": True, "act_group_aware": False, "static_groups": True}
    config = QuantizeConfig(bits=scheme.weight_bits, group_size=scheme.group, **options)
    results = []
    for one, moments, tokens in zip(weight, hessians.sums, hessians.tokens.tolist(), strict=True):
        linear = torch.nn.Linear(*reversed(one.shape), bias=False)
        linear.weight.data = one.clone()
        task = GPTQ(linear, config)
        task.quantizer.configure(perchannel=True)
        task.H, task.nsamples = (2 * moments / max(tokens, 1)).float(), tokens
        results.append(task.quantize()[0].float())
    return torch.stack(results)


def ours(weight: torch.Tensor, hessians: Hessians, scheme: Scheme) -> torch.Tensor:
    """As `calibrate` does it."""
    return gptq(weight, hessians, scheme).dequantize()


def rounded(weight: torch.Tensor, _: Hessians, scheme: Scheme) -> torch.Tensor:
    """Round to nearest."""
    return round_to_nearest(weight, scheme).dequantize()


CONTENDERS: dict[str, Quantize] = {
    "rtn": rounded,
    "gptq": ours,
    "llm-compressor": llm_compressor(None),
    "llm-compressor, actorder static": llm_compressor("static"),
    "GPTQModel, act-order, static groups": gptq_model,
}


def moments(
    folder: ModelFolder, layer: int, experts: Sequence[int], captured: list[dict[str, torch.Tensor]], part: slice
) -> list[Hessians]:
    """Hessians of gate, up and down of some experts from some quarters of the tokens of every domain."""
    tensors = {
        name: torch.cat([quarter for domain in captured for quarter in domain[name].chunk(4)[part]])
        for name in captured[0]
    }
    inputs = LayerInputs(tensors, folder.experts)
    gate, up = (read_block(folder, layer, experts, block).float() for block in BLOCKS[:2])
    gating = read_gating(folder, layer, experts)
    width, hidden = gate.shape[1:]
    entering = torch.zeros(len(experts), hidden, hidden, dtype=torch.float64)
    inner = torch.zeros(len(experts), width, width, dtype=torch.float64)
    for place, expert in enumerate(experts):
        blocks = gate[place], up[place]
        add_moments(entering[place], inner[place], inputs.batches(expert), *blocks, gating[place])
    tokens = torch.tensor([inputs.tokens(expert) for expert in experts])
    first = Hessians(entering, tokens, entering.sum(0) / tokens.sum(), DAMPING)
    return [first, first, Hessians(inner, tokens, inner.sum(0) / tokens.sum(), DAMPING)]


def main() -> None:
    """Run the comparison and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capture", default="results/demo-moe/capture")
    parser.add_argument("--model", default="resources/demo-moe")
    parser.add_argument("--schemes", nargs="+", default=["w2a16", "w3a16", "w4a16"])
    args = parser.parse_args()
    folder = open_model(args.model)
    routed, rows = range(folder.experts), []
    for layer in folder.moe_layers:
        captured = [load_file(file) for file in sorted(Path(args.capture).glob(f"*/layer-{layer:03d}.safetensors"))]
        known, held_out = (moments(folder, layer, routed, captured, part) for part in (slice(3), slice(3, None)))
        for scheme in map(parse_scheme, args.schemes):
            for block, seen, unseen in zip(BLOCKS, known, held_out, strict=True):
                weight = read_block(folder, layer, routed, block).float()
                for name, quantize in CONTENDERS.items():
                    change = quantize(weight, seen, scheme).double() - weight.double()
                    errors = [((change @ part.sums) * change).sum((1, 2)) for part in (seen, unseen)]
                    for expert, (one, other) in enumerate(zip(*(error.tolist() for error in errors), strict=True)):
                        rows.append((scheme.name, name, layer, block, expert, one, other))
        print(f"layer {layer}", file=sys.stderr, flush=True)
    columns = ["scheme", "quantizer", "layer", "block", "expert", "seen", "held out"]
    table = pd.DataFrame(rows, columns=columns).set_index(columns[:5])
    relative = table / table.xs("rtn", level="quantizer").reindex(table.index.droplevel("quantizer")).to_numpy()
    sums = table.groupby(["scheme", "quantizer"], sort=False).sum()
    sums /= sums.xs("rtn", level="quantizer").reindex(sums.index.droplevel("quantizer")).to_numpy()
    sums["worst block, seen"] = relative["seen"].groupby(["scheme", "quantizer"], sort=False).max()
    print(
        ", ".join(f"{name} {version(name)}" for name in ("llmcompressor", "compressed-tensors", "gptqmodel", "torch"))
    )
    print(sums.round(3).to_string())


if __name__ == "__main__":
    main()
