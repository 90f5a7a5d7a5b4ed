"""Is a second allocation, at the quantized model, worth its time?

    snakemake --cores 2                          # the demo
    python benchmarks/second_allocation.py       # 20 minutes on one core

The first allocation is that of least loss (r = 1, block granularity, the defaults of `frontier`). The second starts
from the model that `quantize` made of it, or `tune`. There dKL, the change of a domain's KL divergence from the
original when one block takes another scheme, is estimated to second order in the change dy of its layer's output: the
mean over tokens of g . dy + 1/2 (h . dy)^2, with g the gradient of the KL divergence itself and h that of the
log-likelihood of next tokens drawn from the quantized model, whose second moment is the KL divergence's curvature. dy
is what the step from one scheme's GPTQ weights to the other's does, at the tuned model, too. The second allocation
minimises dKL, in each domain over the loss of uniform weights, and its checkpoint is quantized and tuned as the first.
Text that is evaluated: `held_out`.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from domains import Calibration, least_loss
from held_out import LENGTH, Model, Weights, load_weights, packed_weights, row_of
from quantizers import UNTIMED
from torch import nn
from transformers import AutoModelForCausalLM
from tuning import Study, parsed

from mxmoe_steps.allocation.blocks import Losses, with_least_tokens
from mxmoe_steps.allocation.constraints import Constraints
from mxmoe_steps.allocation.domains import count_domains, uniform_within
from mxmoe_steps.allocation.files import write_allocation
from mxmoe_steps.calibration.inputs import Batch, LayerInputs
from mxmoe_steps.calibration.loss import Loss
from mxmoe_steps.calibration.losses import expert_losses
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.identity import fingerprint
from mxmoe_steps.models.weights import read_gating
from mxmoe_steps.schemes import BLOCKS

BATCH = 4  # sequences of a pass
LEAST_TOKENS = 1.0  # the default of `frontier`


class Taylor(Loss):
    """g . dy + 1/2 (h . dy)^2; the batch's gradients are [g, h], [n, 2H]."""

    per_token = True

    def of(self, change: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See `Loss.of`; may be negative."""
        assert batch.gradient is not None
        first, drawn = (
            (torch.linalg.vecdot(change, part) * batch.scale).double() for part in batch.gradient.chunk(2, dim=-1)
        )
        return (first + 0.5 * drawn.square()).sum()


class Watched:
    """A model with other weights, and what `capture` would write of its layers, with [g, h] for gradients."""

    def __init__(self, path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)
        self._found: dict[int, dict[str, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
        self._probes: list[torch.Tensor] = []  # zeros that are added to the layers' outputs
        for number, layer in enumerate(self.model.model.layers):
            layer.mlp.experts.register_forward_pre_hook(partial(self._entering, number))
            layer.mlp.shared_expert_gate.register_forward_hook(partial(self._gated, number))
            layer.mlp.register_forward_hook(self._probed)

    def _entering(self, number: int, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        for name, tensor in zip(("hidden", "ids", "weights"), args, strict=True):
            self._found[number][name].append(tensor.detach())

    def _gated(self, number: int, _module: nn.Module, _args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._found[number]["shared"].append(torch.sigmoid(output.detach()).flatten())

    def _probed(self, _module: nn.Module, _args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        self._probes.append(torch.zeros_like(output, requires_grad=True))
        return output + self._probes[-1]

    def run(self, tokens: torch.Tensor, log_p: torch.Tensor, generator: torch.Generator) -> None:
        """Some tokens [S, L]; ``log_p`` [S, L, V]: their log-probabilities in the original."""
        self._probes.clear()
        log_q = self.model(tokens).logits.log_softmax(-1)
        labels = torch.multinomial(log_q.detach().exp().flatten(0, 1), 1, generator=generator)
        drawn = -log_q.flatten(0, 1).gather(-1, labels).sum()
        kl = (log_p.exp() * (log_p - log_q)).sum()
        both = zip(
            torch.autograd.grad(kl, self._probes, retain_graph=True),
            torch.autograd.grad(drawn, self._probes),
            strict=True,
        )
        for number, gradients in enumerate(both):
            self._found[number]["gradient"].append(torch.cat(gradients, dim=-1).flatten(0, 1))

    def layers(self, sizes: list[int]) -> Iterator[LayerInputs]:
        """What was found, layer by layer; ``sizes``: tokens of every domain."""
        for number in sorted(self._found):
            tensors = {name: torch.cat(parts) for name, parts in self._found.pop(number).items()}
            yield LayerInputs(tensors, self.model.config.num_experts, sizes)


def changes_of_kl(study: Study, calibration: Calibration, weights: Weights, choice: np.ndarray) -> Losses:
    """dKL at the model that has ``weights``, for losses: of every block under every scheme instead of ``choice``."""
    path, losses = study.args.model, calibration.losses
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    watched, generator, folder = Watched(path), torch.Generator().manual_seed(0), open_model(path)
    load_weights(watched.model, weights)
    for name in losses.domains:
        for run in study.tokens(name).split(BATCH):
            with torch.no_grad():
                log_p = original(run).logits.log_softmax(-1)
            watched.run(run, log_p, generator)
    packed, found = calibration.of(choice), {}
    every_layer = watched.layers([study.sequences * LENGTH] * len(losses.domains))
    for layer, inputs in zip(folder.moe_layers, every_layer, strict=True):
        for expert in folder.expert_ids():
            keys = [(layer, expert, block) for block in BLOCKS]
            own, gating = [weights[key].float() for key in keys], read_gating(folder, layer, [expert])[0]
            for column, scheme in enumerate(losses.schemes):
                moved = [calibration.weights[scheme.name][key].float() - packed[key].float() for key in keys]
                sums = expert_losses(inputs.batches(expert), own, moved, gating, None, [Taylor()], len(inputs.sizes))
                for key, by_domain in zip(keys, sums[..., 0] / len(inputs), strict=True):
                    found[key, column] = by_domain.numpy()  # [D]
    by_domain = np.stack(
        [[found[key, column] for column in range(len(losses.schemes))] for key in calibration.keys]
    ).transpose(2, 0, 1)
    return replace(losses, loss=by_domain.sum(0), by_domain=by_domain)


def allocated(calibration: Calibration, losses: Losses, budget: float) -> np.ndarray:
    """Schemes by number, int64 [B], of least ``losses`` over those of uniform weights at the original, mean over
    domains.
    """
    candidates = list(losses.schemes)
    counted = with_least_tokens(calibration.losses, LEAST_TOKENS)
    domains = count_domains(counted, uniform_within(counted, candidates, f"{budget:g}"), "relative", {}, [])
    loss = domains.loss(with_least_tokens(losses, LEAST_TOKENS).by_domain)
    loss -= loss.min(1, keepdims=True)  # the solver's losses are not negative
    return least_loss(replace(losses, loss=loss), budget, Constraints())


def written(args: argparse.Namespace, calibration: Calibration, choice: np.ndarray, path: Path) -> Path:
    """The allocation's file."""
    names = [calibration.losses.schemes[column].name for column in choice.tolist()]
    experts = dict.fromkeys(key[:2] for key in calibration.keys)
    rows = [[*expert, *names[3 * number : 3 * number + 3]] for number, expert in enumerate(experts)]
    made = {
        "assignment": rows,
        "granularity": "block",
        "model": fingerprint(open_model(args.model)),
        "quantizer": "gptq",
    }
    write_allocation(str(path), UNTIMED | made)
    return path


def main() -> None:
    """Run the study and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16, help="of 512 tokens of each domain")
    args = parsed(parser)
    study, model, rows = Study(args, args.sequences), Model(args.model, args.evaluated), []
    calibration = Calibration(study.folder / "calibrate")

    def made(name: str, choice: np.ndarray) -> dict[str, Weights]:
        """Weights of the checkpoint called ``name``, untuned and tuned."""
        allocation = written(args, calibration, choice, study.folder / f"{name}.json")
        untuned = study.quantized(name, allocation)
        checkpoints = {"untuned": untuned, "tuned": study.tuned(name, untuned)}
        return {how: packed_weights(checkpoint, args.model) for how, checkpoint in checkpoints.items()}

    for budget in args.budgets:
        choice = allocated(calibration, calibration.losses, budget)
        found = {"first": (choice, made(f"first-{budget:g}", choice))}
        for how, weights in found["first"][1].items():
            start = time.perf_counter()
            changes = changes_of_kl(study, calibration, weights, choice)
            print(f"estimated at the {how} model in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            again = allocated(calibration, changes, budget)
            found[f"second, at the {how} model"] = again, made(f"second-{how}-{budget:g}", again)
        for how in ("untuned", "tuned"):
            base = None
            for name, (chosen, weights) in found.items():
                kl = model.kl(weights[how])
                base = base or kl
                names = {"bits": budget, "weights": how, "allocation": name, "moved": int((chosen != choice).sum())}
                rows.append(row_of(kl, base, **names))
                print(pd.DataFrame(rows[-1:]).round(4).to_string(header=False), file=sys.stderr, flush=True)
    print(pd.DataFrame(rows).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
