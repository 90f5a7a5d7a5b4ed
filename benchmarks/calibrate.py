"""How long calibration takes at the size of real models, how much memory, and how exact it is.

    python benchmarks/calibrate.py --device cuda          # one layer of each shape, 128 x 4096 tokens, random weights
    python benchmarks/calibrate.py --device cpu           # a small layer: also how long the reference way takes

Weights and captured inputs of a layer are drawn on the device, written to a folder and read back as `calibrate` does
it. Steps are timed for --layers different layers in a row, reading the next while computing one. The first also
starts the libraries; columns of steps are means over the others, and the whole model is the first layer plus as many
of the others as it has.
The reference way runs the whole layer 3E times per scheme, each time with one block of one expert quantized.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from mxmoe_steps.calibration.inputs import Batch, LayerInputs
from mxmoe_steps.calibration.loss import losses_of
from mxmoe_steps.calibration.losses import expert_losses, layer_losses
from mxmoe_steps.calibration.weights import quantize_layer
from mxmoe_steps.models.families import ModelFolder, open_model
from mxmoe_steps.models.gating import Gating
from mxmoe_steps.models.weights import read_block
from mxmoe_steps.quantizers.grid import quantize_activations, round_to_nearest
from mxmoe_steps.quantizers.method import Method, method_names
from mxmoe_steps.schemes import BLOCKS, SHARED, Scheme, parse_scheme


class Shape(NamedTuple):
    """A model's MoE layers; ``shared`` is the width of the shared expert, 0 for none."""

    family: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    shared: int


SHAPES = {
    "qwen1.5-moe-a2.7b": Shape("qwen2_moe", 24, 60, 4, 2048, 1408, 5632),
    "deepseek-v2-lite": Shape("deepseek_v2", 26, 64, 6, 2048, 1408, 2816),
    "qwen3-30b-a3b": Shape("qwen3_moe", 48, 128, 8, 2048, 768, 0),
    "small": Shape("qwen2_moe", 6, 16, 4, 256, 128, 256),
}


CAPTURED = "layer-000.safetensors"
CHECKED = ("w2a16", "w4a16", "w8a16", "w4a8", "w8a8", "w8a8_fp8", "w4a4")  # losses of these against float64


class Normal:
    """Standard normal numbers on a device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def __call__(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device)


def draw_layer(shape: Shape, tokens: int, seed: int, device: torch.device, out: Path) -> ModelFolder:
    """A one-layer checkpoint ``out`` with random weights, and ``out``/layer-000.safetensors as `capture` writes it.

    Experts' traffic is skewed (log-normal logits), hidden states have outlier features.
    """
    normal = Normal(device, seed)
    config = {"model_type": shape.family, "num_experts": shape.experts, "num_hidden_layers": 1, "hidden_act": "silu"}
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    folder = open_model(out)
    weights = {}
    for expert in folder.expert_ids():
        width = shape.shared if expert == SHARED else shape.width
        for block in BLOCKS:
            size = (shape.hidden, width) if block == "down" else (width, shape.hidden)
            weights[folder.block_name(0, expert, block)] = (normal(*size) * size[1] ** -0.5).bfloat16().cpu()
    save_file(weights, out / "model.safetensors")
    features = (0.5 * normal(shape.hidden)).exp()
    logits = normal(tokens, shape.experts) + 0.7 * normal(shape.experts)
    chosen, ids = logits.softmax(-1).topk(shape.top_k)
    captured = {
        "hidden": (normal(tokens, shape.hidden) * features).bfloat16().cpu(),
        "ids": ids.to(torch.int16).cpu(),
        "weights": chosen.cpu(),
        "gradient": (1e-3 * normal(tokens, shape.hidden)).bfloat16().cpu(),
    }
    if shape.shared:
        captured["shared"] = torch.sigmoid(normal(tokens)).cpu()
    save_file(captured, out / CAPTURED)
    return folder


class Clock:
    """Seconds and peak GPU memory of named steps; steps of the same name add up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_gib: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
            self.peak_gib[name] = max(self.peak_gib.get(name, 0.0), torch.cuda.max_memory_allocated() / 2**30)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def run_layers(folders: list[ModelFolder], device: torch.device, method: Method, scheme: Scheme) -> list[Clock]:
    """The steps of `mxmoe_steps.calibrate` one by one; a clock per layer."""
    clocks = []
    inputs = LayerInputs.read([[folder.path / CAPTURED] for folder in folders], folders[0].experts, device)
    for folder in folders:
        clocks.append(Clock(device))
        with clocks[-1].step("read"):
            entering = next(inputs)
        run_layer(folder, entering, clocks[-1], method, scheme)
    return clocks


def run_layer(folder: ModelFolder, inputs: LayerInputs, clock: Clock, method: Method, scheme: Scheme) -> None:
    """What `mxmoe_steps.calibrate.calibrate_layer` does, and writing it."""
    packed = {}
    for experts in [list(range(folder.experts))] + ([[SHARED]] if inputs.shared is not None else []):
        with clock.step("read"):
            weights = [read_block(folder, 0, experts, block, clock.device) for block in BLOCKS]
        with clock.step("quantize"):
            stacks = quantize_layer(inputs, experts, weights, Gating(silu), scheme, method)
        with clock.step("losses"):
            layer_losses(inputs, experts, weights, stacks, Gating(silu), scheme, method, losses_of([]))
        with clock.step("pack"):
            for index, expert in enumerate(experts):
                for block, stack in zip(BLOCKS, stacks, strict=True):
                    for part, tensor in stack[index].tensors().items():
                        packed[f"0.{expert}.{block}.{part}"] = tensor.cpu()
    with clock.step("write"):
        save_file(packed, folder.path / "packed.safetensors")


def worst_error(shape: Shape, device: torch.device, scheme: Scheme) -> float:
    """Largest relative error of a loss against float64, over blocks and both losses: one expert, 4,096 tokens."""
    normal = Normal(device, seed=0)
    sizes = [(shape.width, shape.hidden)] * 2 + [(shape.hidden, shape.width)]
    weights = [(normal(*size) * size[1] ** -0.5).bfloat16().float() for size in sizes]
    changes = [round_to_nearest(weight, scheme).dequantize() - weight for weight in weights]
    x, scale, gradient = normal(4096, shape.hidden).bfloat16(), normal(4096).sigmoid(), normal(4096, shape.hidden)

    def seen(entering: torch.Tensor) -> torch.Tensor:
        return quantize_activations(entering.float(), scheme).to(entering.dtype)

    view = None if scheme.act_bits == 16 else seen
    found = expert_losses([Batch(x.float(), scale, gradient)], weights, changes, Gating(silu), view, losses_of([]))
    exact = [Batch(x.double(), scale.double(), gradient.double())]
    doubled = [[value.double() for value in values] for values in (weights, changes)]
    reference = expert_losses(exact, doubled[0], doubled[1], Gating(silu), view, losses_of([]))
    return float(((found - reference) / reference).abs().max())


def reference_seconds(folder: ModelFolder, device: torch.device) -> float:
    """Seconds of one pass of the whole layer in float32 on its captured inputs."""
    captured = load_file(folder.path / CAPTURED, device=str(device))
    hidden, ids, factors = captured["hidden"].float(), captured["ids"].long(), captured["weights"]
    experts = {
        expert: [read_block(folder, 0, [expert], block, device)[0].float() for block in BLOCKS]
        for expert in folder.expert_ids()
    }
    clock = Clock(device)
    with clock.step("layer"):
        result = torch.zeros_like(hidden)
        for expert, (gate, up, down) in experts.items():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            x, factor = (hidden, captured["shared"]) if expert == SHARED else (hidden[token], factors[token, slot])
            output = ((silu(x @ gate.T) * (x @ up.T)) @ down.T) * factor.unsqueeze(-1)
            result = result + output if expert == SHARED else result.index_add_(0, token, output)
    return clock.seconds["layer"]


def main() -> None:
    """Run and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), help="default: all on a GPU, small on a CPU")
    parser.add_argument("--tokens", type=int, help="calibration tokens; default 524288 on a GPU, 8192 on a CPU")
    parser.add_argument("--quantizers", nargs="+", default=["rtn", "gptq"], choices=method_names())
    parser.add_argument("--schemes", nargs="+", default=["w4a16"])
    parser.add_argument("--layers", type=int, default=3, help="layers to time, at least 2")
    parser.add_argument("--folder", help="where layers are written; default the system's temporary folder")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    cuda = device.type == "cuda"
    rows = []
    for name in args.models or ([model for model in SHAPES if model != "small"] if cuda else ["small"]):
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            tokens = args.tokens or (524288 if cuda else 8192)
            folders = [
                draw_layer(SHAPES[name], tokens, layer, device, Path(temporary) / str(layer))
                for layer in range(args.layers)
            ]
            for quantizer, scheme in itertools.product(args.quantizers, map(parse_scheme, args.schemes)):
                clocks = run_layers(folders, device, Method(quantizer), scheme)
                steps = pd.DataFrame([clock.seconds for clock in clocks])
                steps["total"] = steps.sum(axis=1)
                whole = steps["total"][0] + (SHAPES[name].layers - 1) * steps["total"][1:].mean()
                peak = {f"{step} GiB": gib for step, gib in clocks[-1].peak_gib.items()}
                row = {"model": name, "quantizer": quantizer, "scheme": scheme.name, "first layer": steps["total"][0]}
                rows.append(row | dict(steps[1:].mean()) | {"whole model": whole} | peak)
                print(pd.DataFrame(rows[-1:]).to_json(orient="records"), file=sys.stderr, flush=True)
            if not cuda:
                passes = 3 * len(folders[0].expert_ids())
                seconds = passes * reference_seconds(folders[0], device)
                print(f"{name}: the reference way, {passes} passes of the layer per scheme: {seconds:.2f} s")
    table = pd.DataFrame(rows)
    print(table.round(2).to_string(index=False))
    errors = []
    for name, scheme in itertools.product(dict.fromkeys(table["model"]), CHECKED):
        error = worst_error(SHAPES[name], device, parse_scheme(scheme))
        errors.append({"model": name, "scheme": scheme, "worst relative error": error})
    print(pd.DataFrame(errors).to_string(index=False, float_format="{:.1e}".format))


if __name__ == "__main__":
    main()
