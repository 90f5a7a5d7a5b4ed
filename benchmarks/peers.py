"""Ours beside AutoRound, llm-compressor and GPTQModel: KL divergence by text at equal bits, the same calibration text.

    snakemake --cores 2                              # the demo: traffic and profile
    pip install --no-deps auto-round==0.16.1 llmcompressor==0.14.0.1 compressed-tensors==0.19.0 gptqmodel==7.7.0
    pip install --no-deps defuser device-smi logbar loguru nvidia-ml-py py-cpuinfo pypcre tokenicer torchao
    python benchmarks/tuning.py --sequences 16       # ours
    python benchmarks/peers.py                       # half an hour on one core

In an environment of its own with this package in it; without dependencies, as what the peers ask for excludes one
another. AutoRound runs on the expert blocks as it is, in float32: one decoder layer at a time, 200 iterations of 8
sequences. Of llm-compressor and GPTQModel, GPTQ itself runs on the Hessians that ours has of the same tokens
(`gptq_peers`). Of AutoScheme, AutoRound's allocation, the allocation is taken and gets our GPTQ weights. All weights
are of groups of 128 and asymmetric; bits count 16 of scale and 16 of zero point a group, as ours have them. Peers store
zero points of the weight's width, 0.1 bits less. Text that is evaluated: `held_out`.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
from domains import Calibration
from gptq_peers import gptq_model, llm_compressor, moments, rounded
from held_out import DOMAINS, LENGTH, Model, Weights, packed_weights, row_of
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from tuning import Study, parsed

from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.weights import read_block
from mxmoe_steps.schemes import BLOCKS, SHARED, Scheme, parse_scheme

QUANTIZERS = {
    "RTN": rounded,
    "llm-compressor's GPTQ, actorder static": llm_compressor("static"),
    "GPTQModel's GPTQ, act-order, static groups": gptq_model,
}
BATCH = 8  # sequences of one of AutoRound's iterations
SCORED = 2  # sequences that AutoScheme scores at a time
ITERATIONS = 200  # AutoRound's default
OVERHEAD = 0.25  # bits of scales and zero points


def of_quantizers(study: Study, bits: int) -> dict[str, Weights]:
    """Every block on the peers' grids, from the captured tokens."""
    folder, scheme = open_model(study.args.model), parse_scheme(f"w{bits}a16")
    found: dict[str, dict[tuple[int, int, str], torch.Tensor]] = {name: {} for name in QUANTIZERS}
    for layer in folder.moe_layers:
        captured = [load_file(capture / f"layer-{layer:03d}.safetensors") for capture in study.captures]
        for experts in (range(folder.experts), [SHARED]):
            for block, hessians in zip(BLOCKS, moments(folder, layer, experts, captured, slice(4)), strict=True):
                weight = read_block(folder, layer, experts, block).float()
                for name, quantize in QUANTIZERS.items():
                    for expert, one in zip(experts, quantize(weight, hessians, scheme), strict=True):
                        found[name][layer, expert, block] = one
    return found


class AutoRoundModel:
    """The model as AutoRound takes it, and its calibration text: the study's."""

    def __init__(self, study: Study) -> None:
        self.path = study.args.model
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.tokens = torch.stack([study.tokens(name) for name in DOMAINS], dim=1).flatten(0, 1)
        self.file = study.folder / "auto-round.jsonl"
        lines = [json.dumps({"text": self.tokenizer.decode(row)}) for row in self.tokens]
        self.file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def quantized(self, **options: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The model with quantized experts, and what AutoRound says of every layer."""
        from auto_round import AutoRound

        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        kept = {name: {"bits": 16} for name in unquantized(model)}
        run = AutoRound(
            model, tokenizer=self.tokenizer, layer_config=kept, nsamples=len(self.tokens), batch_size=BATCH, amp=False,
            enable_torch_compile=False, **options,
        )  # fmt: skip
        return run.quantize()

    def uniform(self, bits: int) -> Weights:
        """AutoRound's weights."""
        rows = [{"input_ids": row} for row in self.tokens]
        batches = torch.utils.data.DataLoader(rows, batch_size=BATCH)  # type: ignore[arg-type]
        how = {"bits": bits, "group_size": 128, "sym": False, "iters": ITERATIONS}
        modules = dict(self.quantized(dataset=batches, seqlen=LENGTH, **how)[0].named_modules())
        return {key: modules[name].weight.detach() for key, name in self.names()}

    def allocation(self, bits: float, schemes: Sequence[Scheme]) -> dict[tuple[int, int, str], Scheme]:
        """AutoScheme's scheme of every block, for codes of so many bits on average."""
        from auto_round import AutoScheme
        from auto_round.schemes import QuantizationScheme

        options = [
            QuantizationScheme(
                bits=one.weight_bits, group_size=one.group, sym=one.symmetric, data_type="int", act_bits=16
            )
            for one in schemes
        ]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.path))
        kept = sum(module.weight.numel() for name, module in unquantized(model).items() if name != "lm_head")
        folder = open_model(self.path)
        experts = sum(math.prod(folder.raw_block(*key).shape) for key, _ in self.names())
        average = (bits * experts + 16 * kept) / (experts + kept) + 1e-6  # AutoScheme counts attention, too
        text = {"dataset": str(self.file), "seqlen": LENGTH * 7 // 8}  # decoded text can come back as fewer tokens
        scheme = AutoScheme(average, options, ignore_scale_zp_bits=True, nsamples=len(self.tokens), batch_size=SCORED,
                            low_gpu_mem_usage=False, low_cpu_mem_usage=False, **text)  # fmt: skip
        layers = self.quantized(scheme=scheme, iters=0, **text)[1]
        by_bits = {one.weight_bits: one for one in schemes}
        return {key: by_bits[layers[name]["bits"]] for key, name in self.names()}

    def names(self) -> Iterator[tuple[tuple[int, int, str], str]]:
        """Every block, and what its module is called."""
        folder = open_model(self.path)
        for layer in folder.moe_layers:
            for expert in folder.expert_ids():
                own = "shared_expert" if expert == SHARED else f"experts.{expert}"
                for block in BLOCKS:
                    yield (layer, expert, block), f"model.layers.{layer}.mlp.{own}.{block}_proj"


def unquantized(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Linear modules that are no expert's, by name; routed experts are no modules."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "mlp.shared_expert." not in name
    }


def contenders(args: argparse.Namespace, study: Study, bits: int) -> Iterator[tuple[str, float, Weights]]:
    """Name, bits and weights of every row; our uniform GPTQ first."""
    budget = bits + OVERHEAD
    calibration, auto_round = Calibration(study.folder / "calibrate"), AutoRoundModel(study)
    yield "ours, uniform GPTQ", budget, calibration.of(calibration.uniform(budget))
    uniform, mixed = f"uniform-{budget:g}", f"{budget:g}"
    untuned = study.quantized(uniform, study.allocation(uniform, budget, r=1, granularity="uniform"))
    yield "ours, uniform GPTQ, tuned", budget, packed_weights(study.tuned(uniform, untuned), args.model)
    untuned = study.quantized(mixed, study.allocation(mixed, budget))
    yield "ours, mixed", budget, packed_weights(untuned, args.model)
    yield "ours, mixed, tuned", budget, packed_weights(study.tuned(mixed, untuned), args.model)
    for name, weights in of_quantizers(study, bits).items():
        yield name, budget, weights
    schemes = [scheme for scheme in calibration.losses.schemes if scheme.weight_bits > 1]  # AutoRound has no 1 bit
    if bits > min(scheme.weight_bits for scheme in schemes):
        chosen = auto_round.allocation(bits, schemes)
        choice = np.array([calibration.losses.schemes.index(chosen[key]) for key in calibration.keys])
        found = calibration.losses.bits[np.arange(len(choice)), choice].sum() / calibration.losses.blocks.params.sum()
        changed = int((choice != calibration.uniform(budget)).sum())
        yield f"AutoScheme's allocation ({changed} blocks not w{bits}), our GPTQ", found, calibration.of(choice)
    yield "AutoRound, uniform", budget, auto_round.uniform(bits)


def main() -> None:
    """Run the comparison and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16, help="of 512 tokens of each domain")
    args = parsed(parser)
    study, model, rows = Study(args, args.sequences), Model(args.model, args.evaluated), []
    for budget in args.budgets:
        base = None
        for name, bits, weights in contenders(args, study, int(budget)):
            found = model.kl(weights)
            base = base or found
            rows.append(row_of(found, base, bits=bits, weights=name))
            print(pd.DataFrame(rows[-1:]).round(4).to_string(header=False), file=sys.stderr, flush=True)
    packages = ("auto-round", "llmcompressor", "compressed-tensors", "gptqmodel", "torch", "transformers")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    print(pd.DataFrame(rows).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
