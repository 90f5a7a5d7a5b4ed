"""calibrate: what quantizing each linear block under one scheme does to the output of its layer.

For one quantizer and one scheme, from the captures of one or several domains of text, writes
  SCHEME.parquet      losses per layer, expert and block (gate, up, down), and the parts of them that are of each domain
  SCHEME.safetensors  the quantized weights themselves, packed: `quantize` picks from them

One layer at a time, on a GPU where ``--device`` says so: memory holds that layer's weights, its captured inputs and a
bounded workspace. Losses are float32 with float64 sums, Hessians float64, before the residual addition.

A run that was stopped goes on at the first layer that is missing. --layers does some of the layers: several such jobs,
at once or one after the other, and then one without it, which does the rest, write the bytes of one job.
"""

import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from mxmoe_steps.atomic import working_in
from mxmoe_steps.calibration.loss import BUILTIN, Loss, losses_of
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.extensions import load, modules_of
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Flag, InFolders, LossName, Natural, Options, OutFolder, SchemeName, StepOptions
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import Compute, Extended, OfModel
from mxmoe_steps.quantizers.method import Method
from mxmoe_steps.quantizers.names import DAMPING, QuantizerName
from mxmoe_steps.schemes import BLOCKS, SHARED, Scheme, parse_scheme
from mxmoe_steps.values import distinct

if TYPE_CHECKING:
    from torch import Tensor

    from mxmoe_steps.calibration.inputs import LayerInputs
    from mxmoe_steps.models.families import ModelFolder


class Quantizing(Options):
    """How weights are quantized."""

    damping: Annotated[float, Field(gt=0, le=1)] = Field(
        DAMPING, description="fraction of its mean diagonal that is added to a Hessian, for quantizers that use them"
    )


class CalibrateOptions(Quantizing, OfModel, Extended, Compute, StepOptions):
    """Options of the step."""

    capture: InFolders = Field(description="folders that capture wrote, one per domain of the text", min_length=1)
    quantizer: QuantizerName = Field(description="how to quantize weights (docs/schemes.md)")
    scheme: SchemeName = Field(description="how a block is stored and multiplied, e.g. w4a16 or w8a8_fp8")
    more_losses: Annotated[list[LossName], AfterValidator(distinct)] = Field(
        [], description="losses of the user's modules to compute besides fisher and out_sq"
    )
    layers: Annotated[tuple[Natural, Natural] | None, Flag("LAYER", decides=False)] = Field(
        None, description="only do the layers from the first to before the second, for a later run without it"
    )
    out: OutFolder = Field(description="folder to write")


def calibrate_layer(
    folder: "ModelFolder", layer: int, inputs: "LayerInputs", scheme: Scheme, method: Method, losses: Sequence[Loss]
) -> "tuple[list[Any], dict[str, Tensor]]":
    """Rows of `tables.LOSSES` and packed tensors of one layer; `UserError` for a loss that is not finite.

    A row is a tuple in the order of the columns that are no losses, with all ``losses`` at its end: of all tokens, then
    the part of every domain.
    """
    import torch

    from mxmoe_steps.calibration.losses import layer_losses
    from mxmoe_steps.calibration.weights import quantize_layer
    from mxmoe_steps.models.published import is_published, read_published
    from mxmoe_steps.models.weights import read_block, read_gating

    rows, packed = [], {}
    for experts in [list(range(folder.experts))] + ([[SHARED]] if inputs.shared is not None else []):
        weights = [read_block(folder, layer, experts, block, inputs.device) for block in BLOCKS]
        kept = scheme.published and is_published(folder, layer, experts, scheme)
        if kept:
            blocks = zip(BLOCKS, weights, strict=True)
            stacks = [read_published(folder, layer, experts, block, scheme, weight) for block, weight in blocks]
            found = torch.zeros(len(experts), len(BLOCKS), 1 + len(inputs.sizes), len(losses), dtype=torch.float64)
        else:
            gating = read_gating(folder, layer, experts, inputs.device)
            stacks = quantize_layer(inputs, experts, weights, gating, scheme, method)
            found = layer_losses(inputs, experts, weights, stacks, gating, scheme, method, losses)
        for index, expert in enumerate(experts):
            if not found[index].isfinite().all():
                raise UserError(f"layer {layer}, expert {expert}: the loss under {scheme} is not finite")
            tokens = inputs.tokens(expert)
            for number, block in enumerate(BLOCKS):
                out_features, in_features = weights[number].shape[1:]
                few = method.uses_hessians and not kept and tokens < in_features
                row = (layer, expert, block, out_features, in_features, scheme.bits(in_features), tokens, few)
                rows.append((*row, found[index, number].tolist()))
                for part, tensor in stacks[number][index].tensors().items():
                    packed[f"{layer}.{expert}.{block}.{part}"] = tensor.cpu()
    return rows, packed


def few_tokens(rows: list[Any]) -> str:
    """What the log says of a layer's experts with too few tokens for Hessians of their own; empty if there are none.

    ``rows`` are those of `calibrate_layer`.
    """
    found = sorted((expert, in_features, tokens) for _, expert, _, _, in_features, _, tokens, few, _ in rows if few)
    if not found:
        return ""
    counts = {  # of an expert's blocks, the one with most input features stays
        expert: f"{'shared' if expert == SHARED else expert} ({tokens} of {in_features})"
        for expert, in_features, tokens in found
    }
    named = ", ".join(counts.values())
    return f"; fewer tokens than input features: experts {named}: their Hessians are mostly the layer's"


def layer_keys(options: CalibrateOptions, folder: "ModelFolder", captured: dict[int, list[Path]]) -> dict[int, Any]:
    """Layer -> what decides its bytes; a layer's file is taken up by a later run if its key is the same.

    ``captured``: its files, one a domain.
    """
    from mxmoe_steps.provenance import file_marks, stamps

    method = Method(options.quantizer)
    extensions = modules_of(options.extensions)
    deciding = options.deciding()
    common = {
        "options": deciding if method.uses_hessians else {**deciding, "damping": None},
        "code": stamps("mxmoe_steps.calibrate", without=method.unused_modules, extensions=extensions),
    }
    return {
        layer: common | {"inputs": options.made_from or file_marks([*folder.sources, *files])}
        for layer, files in captured.items()
    }


def finished(path: Path, key: Any) -> Any:
    """``rows`` and ``fisher`` of a layer that an earlier run left in ``path`` under the same key, or None.

    A file that is damaged counts as missing.
    """
    from mxmoe_steps.facts import PartFacts
    from mxmoe_steps.models.raw import facts_of, tensors_of

    try:
        facts = facts_of(path, PartFacts, "")
        for tensor in tensors_of(path).values():
            tensor.check()
    except UserError:
        return None
    return facts if facts.pop("key") == key else None


def calibrate(options: CalibrateOptions) -> None:
    """Calibrate the MoE layers among ``options.layers``, or all that are missing, and write the result."""
    import torch

    from mxmoe_steps.calibration.amount import warn_if_short
    from mxmoe_steps.calibration.inputs import LayerInputs, check_domains
    from mxmoe_steps.models.families import open_model, resolve_model
    from mxmoe_steps.models.identity import fingerprint
    from mxmoe_steps.models.loading import resolve_device, start_torch
    from mxmoe_steps.models.rows import write_rows
    from mxmoe_steps.tables import NOT_LOSSES

    scheme = parse_scheme(options.scheme)
    if scheme.is_original:
        raise UserError("w16a16 is the original and has no loss; leave it out of calibration")
    load(options.extensions)
    method, losses = Method(options.quantizer, options.damping), losses_of(options.more_losses)
    if scheme.published and method.rotated:
        raise UserError(f"{scheme}: published codes are not rotated; calibrate it with a quantizer without +hadamard")
    if clash := NOT_LOSSES.intersection(options.more_losses):
        raise UserError(f"loss {min(clash)!r}: another column has that name; choose another")
    start_torch(options)
    folder = open_model(resolve_model(options.model))
    device = resolve_device(options.device)
    partial = options.out / f".{scheme}.layers"  # the packed weights of a large model do not fit in memory
    names = {layer: f"layer-{layer:03d}.safetensors" for layer in folder.moe_layers}
    captured = {layer: [capture / name for capture in options.capture] for layer, name in names.items()}
    for file in (file for files in captured.values() for file in files):
        if not file.is_file():
            raise UserError(f"{file}: no such captured layer; run the capture step for this model")
    by_domain = [dict(zip(captured, files, strict=True)) for files in zip(*captured.values(), strict=True)]
    domains = check_domains(by_domain, folder)
    if method.uses_hessians:
        warn_if_short(folder, sum(domains.values()))
    keys = layer_keys(options, folder, captured)
    parts = {layer: partial / name for layer, name in names.items()}
    wanted = folder.moe_layers if options.layers is None else range(*options.layers)
    with working_in(partial, shared=options.layers is not None):
        todo = [layer for layer in folder.moe_layers if layer in wanted and finished(parts[layer], keys[layer]) is None]
        try:
            reading = LayerInputs.read(
                [captured[layer] for layer in todo], folder.experts, device, folder.family.scales_inputs
            )
            for layer, inputs in zip(todo, reading, strict=True):
                if inputs.gradient is None and any(loss.needs_gradient for loss in losses[len(BUILTIN) :]):
                    raise UserError(
                        f"{captured[layer][0]}: holds no gradient, which {', '.join(options.more_losses)} needs;"
                        " run capture with --gradient"
                    )
                rows, packed = calibrate_layer(folder, layer, inputs, scheme, method, losses)
                facts = {"key": keys[layer], "rows": rows, "fisher": inputs.gradient is not None}
                layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()}
                with write_rows(parts[layer], layout, facts) as writer:
                    for name, tensor in packed.items():
                        writer.append(name, tensor)
                note = few_tokens(rows)
                print(f"calibrate {method.name} {scheme}: layer {layer}{note}", file=sys.stderr, flush=True)
        except torch.OutOfMemoryError as error:
            missing = next(layer for layer in todo if finished(parts[layer], keys[layer]) is None)
            raise UserError(
                f"layer {missing} does not fit in the GPU's memory: lower calibrate.sequences, run fewer jobs on the"
                " GPU at a time, or set runtime.device: cpu"
            ) from error
        if options.layers is None:
            done = [(parts[layer], keys[layer]) for layer in folder.moe_layers]
            write_result(options, scheme, fingerprint(folder), domains, done)
            shutil.rmtree(partial)


def write_result(
    options: CalibrateOptions, scheme: Scheme, model: str, domains: dict[str, int], parts: list[tuple[Path, Any]]
) -> None:
    """Both files of the step from those of the layers, each with its key; ``domains``: tokens of each."""
    from mxmoe_steps.models.raw import tensors_of, write_tensors
    from mxmoe_steps.tables import LOSSES, write_table

    found = [finished(part, key) for part, key in parts]
    facts: dict[str, Any] = {"model": model, "quantizer": options.quantizer, "scheme": scheme.name}
    tensors = [item for part, _ in parts for item in tensors_of(part).items()]
    write_tensors(options.out / f"{scheme}.safetensors", tensors, facts)
    rows = [row for layer in found for row in layer["rows"]]
    *known, losses = map(list, zip(*rows, strict=True))
    columns = dict(zip((name for name in LOSSES.schema.names if name not in BUILTIN), known, strict=True))
    for place, suffix in enumerate(["", *(f".{domain}" for domain in domains)]):
        for number, loss in enumerate([*BUILTIN, *options.more_losses]):
            columns[f"{loss}{suffix}"] = [row[place][number] for row in losses]
    facts |= {"domains": domains, "fisher": found[-1]["fisher"]}
    write_table(LOSSES, options.out / f"{scheme}.parquet", columns, facts)


def main() -> None:
    """Command line."""
    options = parse(CalibrateOptions, __doc__)
    outputs = [options.out / f"{options.scheme}.{kind}" for kind in ("parquet", "safetensors")]
    with recorded(options.made_from, outputs) if options.layers is None else nullcontext():
        calibrate(options)


if __name__ == "__main__":
    run_cli(main)
