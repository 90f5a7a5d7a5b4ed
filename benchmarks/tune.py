"""How long tuning takes at the size of real models, and how much memory.

    python benchmarks/tune.py --device cuda                 # two layers of Qwen1.5-MoE-A2.7B, 128 x 2048 tokens
    python benchmarks/tune.py --device cpu --shape small    # two small layers

Random weights, rounded to a mix of schemes, and random hidden states; what is timed is what `mxmoe_steps.tune` does
with a layer but for files: the original's pass, that of the tuned model up to its experts, tuning, the output of the
tuned layer, packing. The first layer also starts the libraries; the whole model is the first layer plus as many of the
others as it has.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from mxmoe_steps.models.gating import Gating
from mxmoe_steps.quantizers.grid import QuantizedWeight, round_to_nearest
from mxmoe_steps.schemes import BLOCKS, parse_scheme
from mxmoe_steps.tuning.experts import Block, Experts
from mxmoe_steps.tuning.layer import LayerText, TunedLayer, descend, metric_of, passes


class Shape(NamedTuple):
    """A model's layers; ``shared`` is the width of the shared expert."""

    layers: int
    hidden: int
    width: int
    shared: int
    experts: int
    top_k: int
    heads: int


SHAPES = {
    "qwen1.5-moe-a2.7b": Shape(24, 2048, 1408, 5632, 60, 4, 16),
    "small": Shape(6, 256, 128, 256, 16, 4, 4),
}
SCHEMES = ("w2a16", "w3a16", "w4a16", "w8a16")
SHARES = (0.6, 0.2, 0.15, 0.05)  # of the experts: about 2.9 bits
Stacks = list[tuple[list[int], QuantizedWeight]]  # places of experts, and a block of theirs
STACK = 8  # experts rounded at a time
BATCH = 8  # sequences of a pass


@dataclass
class Clock:
    """Seconds of named steps."""

    device: torch.device
    seconds: dict[str, float]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what happens inside; steps of the same name add up."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Layer:
    """A decoder layer of random weights (attention, router, routed and shared experts), and its rounded blocks."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            drawn = torch.randn(size, generator=generator, device=device) * size[-1] ** -0.5
            return drawn.to(dtype)

        hidden, width, experts = shape.hidden, shape.width, shape.experts
        self.attention = [normal(hidden, hidden) for _ in range(4)]
        self.router, self.shared_gate = normal(experts, hidden), normal(1, hidden)
        self.routed = [normal(experts, width, hidden), normal(experts, width, hidden), normal(experts, hidden, width)]
        self.shared = [
            normal(1, shape.shared, hidden),
            normal(1, shape.shared, hidden),
            normal(1, hidden, shape.shared),
        ]
        counts = [round(share * experts) for share in SHARES[:-1]]
        places = torch.arange(experts).split([*counts, experts - sum(counts)])
        self.packed = [
            [(own.tolist(), rounded(block, own, name)) for own, name in zip(places, SCHEMES, strict=True) if len(own)]
            for block in self.routed
        ]
        only = torch.zeros(1, dtype=torch.int64)
        self.packed_shared = [[([0], rounded(block, only, "w4a16"))] for block in self.shared]
        unpacked: list[Stacks] = [[] for _ in BLOCKS]
        self.original = self._experts(unpacked, unpacked, dtype)

    def _experts(self, packed: Sequence[Stacks], packed_shared: Sequence[Stacks], precision: torch.dtype) -> TunedLayer:
        routed, shared = (
            Experts(
                [Block(block, stacks, False, precision) for block, stacks in zip(blocks, of_blocks, strict=True)],
                Gating(silu),
            )
            for blocks, of_blocks in ((self.routed, packed), (self.shared, packed_shared))
        )
        return TunedLayer(routed, shared)

    def quantized(self, precision: torch.dtype) -> TunedLayer:
        """As `mxmoe_steps.tuning.reading.read_layer` makes it of files."""
        return self._experts(self.packed, self.packed_shared, precision)

    def entering(self, hidden: torch.Tensor, wanted: torch.Tensor, gradients: list[torch.Tensor]) -> LayerText:
        """As `mxmoe_steps.tuning.reading.read_text` makes it of files; hidden states [S, L, H]."""
        rest = torch.cat([self._attend(run) for run in hidden.split(BATCH)]).flatten(0, 1)
        x = rms_norm(rest, rest.shape[-1:])
        weights, expert_ids = (x @ self.router.T).float().softmax(-1).topk(self.shape.top_k)
        return LayerText(
            hidden=x,
            expert_ids=expert_ids,
            weights=weights,
            shared=torch.sigmoid(x @ self.shared_gate.T).squeeze(-1).float(),
            rest=rest,
            wanted=wanted.flatten(0, 1),
            factor=1.0,
            metric=metric_of(gradients, x.shape[-1]).to(x.device),
            held_out=len(hidden) // 16 * hidden.shape[1],
        )

    def _attend(self, hidden: torch.Tensor) -> torch.Tensor:
        x = rms_norm(hidden, hidden.shape[-1:])
        q, k, v = (
            (x @ weight.T).unflatten(-1, (self.shape.heads, -1)).transpose(1, 2) for weight in self.attention[:3]
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return hidden + mixed @ self.attention[3].T

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The original's output, [S, L, H]."""
        text = self.entering(hidden, hidden, [])
        runs = passes(0, len(text.hidden), BATCH * hidden.shape[1])
        return torch.cat([self.original.output(text, rows).to(hidden.dtype) for rows in runs]).view(hidden.shape)


def rounded(block: torch.Tensor, places: torch.Tensor, scheme: str) -> QuantizedWeight:
    """Some experts of a block [E, N, K] on the nearest points of their grids."""
    parts = [round_to_nearest(block[own].float(), parse_scheme(scheme)) for own in places.split(STACK)]
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    zeros = None if parts[0].zeros is None else torch.cat([part.zeros for part in parts if part.zeros is not None])
    return QuantizedWeight(parts[0].scheme, codes, scales, zeros)


@torch.no_grad()
def run_layer(
    layer: Layer, original: torch.Tensor, tuned: torch.Tensor, args: argparse.Namespace
) -> tuple[Clock, tuple[float, float]]:
    """Seconds of the steps, and the errors of the layer's output before and after; hidden states [S, L, H]."""
    device = original.device
    clock = Clock(device, {})
    gradient = torch.randn(
        original.shape[0] * original.shape[1], original.shape[2], device=device, dtype=original.dtype
    )
    with clock.step("original's pass"):
        wanted = layer(original)
    with clock.step("tuned model's pass"):
        text = layer.entering(tuned, wanted, [gradient])
    with clock.step("make blocks"):
        experts = layer.quantized(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with clock.step("errors"):
        before = experts.error(text)
    with clock.step("descend"), torch.enable_grad():
        descend(experts, text, args.steps, args.step_tokens, args.rate, seed=0)
    with clock.step("errors"):
        after = experts.error(text)
    with clock.step("output"):
        for rows in passes(0, len(text.hidden), BATCH * original.shape[1]):
            experts.output(text, rows).to(original.dtype)
    with clock.step("pack"):
        for kind in (experts.routed, experts.shared):
            assert kind is not None
            for block in kind.blocks:
                for _, blocks in block.tuned:
                    stack = blocks.quantized()
                    for number in range(len(stack.codes)):
                        for tensor in stack[number].tensors().values():
                            tensor.cpu()
    return clock, (before, after)


def main() -> None:
    """Print seconds of each step, and of the whole model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="qwen1.5-moe-a2.7b")
    parser.add_argument("--layers", type=int, default=2, help="layers to time")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-tokens", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=2.5e-3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = SHAPES[args.shape]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    original = torch.randn(args.sequences, args.length, shape.hidden, device=device).to(dtype)
    tuned = original + 0.1 * torch.randn_like(original)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{args.shape} on {name}, torch {torch.__version__}: {args.sequences} x {args.length} tokens, {args.steps}"
          f" steps of {args.step_tokens}")  # fmt: skip
    totals, found = [], []
    for number in range(args.layers):
        layer = Layer(shape, device, dtype, number)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock, (before, after) = run_layer(layer, original, tuned, args)
        totals.append(sum(clock.seconds.values()))
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        found.append({"seconds": clock.seconds, "before": before, "after": after, "peak_gib": peak})
        steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in clock.seconds.items())
        print(f"layer {number}: {totals[-1]:.1f} s ({steps}); {1000 * clock.seconds['descend'] / args.steps:.1f} ms a"
              f" step; error {before:.3g} -> {after:.3g}; peak {peak:.1f} GiB", flush=True)  # fmt: skip
        del layer
    rest = totals[1:] or totals
    whole = totals[0] + (shape.layers - 1) * sum(rest) / len(rest)
    print(f"whole model, {shape.layers} layers: {whole / 60:.1f} min")
    if args.out:
        facts = {"command": " ".join(sys.argv), "device": name, "torch": torch.__version__}
        args.out.write_text(json.dumps(facts | {"layers": found, "whole_seconds": whole}, indent=1) + "\n")


if __name__ == "__main__":
    main()
