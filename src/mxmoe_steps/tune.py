"""tune: a packed checkpoint whose weights are tuned to give what the original's layers give.

One decoder layer at a time, from the first to the last, with two streams of hidden states of one text: the original's,
and that of the layers tuned so far. The experts of a layer are moved by gradient descent, codes, scales and zero points
through the rounding (straight-through), until the layer makes of the second stream what the original made of the first,
as far as the gradients that `capture` kept say that the difference matters. That takes back part of what the layers
below lost, too. Where it does not help on tokens that were held out, the layer stays as it was.

Writes a checkpoint of the same format, size and schemes as the one that it reads. Blocks of more than 4 bits,
attention, norms and router stay as they are. A run that was stopped goes on at the first layer that is missing. Parts
of the work can be jobs of their own, with the same --out: --until K with rising K, and last a run without it.
"""

import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mxmoe_steps.atomic import atomic_folder, write_json
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Count, Flag, InFolder, InFolders, Names, Options, Tokens
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import CalibrationAmount, TextThroughModel

if TYPE_CHECKING:
    from torch import Tensor

    from mxmoe_steps.models.borders import Borders
    from mxmoe_steps.models.families import ModelFolder
    from mxmoe_steps.models.streaming import StreamedModel
    from mxmoe_steps.tuning.layer import LayerText, TunedLayer
    from mxmoe_steps.tuning.reading import PackedFolder


class Descent(Options):
    """How weights are tuned."""

    steps: Count = Field(200, description="steps of gradient descent in each layer")
    step_tokens: Tokens = Field(1024, description="tokens of a step")
    rate: Annotated[float, Field(gt=0, le=1)] = Field(
        2.5e-3,
        description="learning rate of scales, as a fraction of them; codes have twice it, in steps between codes",
    )


class TuneOptions(Descent, CalibrationAmount, TextThroughModel):
    """Options of the step."""

    checkpoint: InFolder = Field(description="folder that quantize wrote")
    texts: Names = Field(description="domains of the calibration text")
    capture: InFolders = Field(
        description="folders that capture wrote, one a domain, in the order of the texts; their gradients say which"
        " errors matter"
    )
    until: Annotated[Count | None, Flag("LAYER", decides=False)] = Field(
        None, description="only tune the layers before this one"
    )


_HELD_OUT = 16  # one sequence in so many is not tuned on, and tells whether tuning helped


def tune_layer(
    options: TuneOptions, model: "StreamedModel", packed: "PackedFolder", layer: int, text: "LayerText"
) -> "tuple[TunedLayer, dict[str, Tensor]]":
    """The layer tuned, or as it was where that is better, and the tensors that changed."""
    from mxmoe_steps.tuning.layer import descend
    from mxmoe_steps.tuning.reading import read_layer, tuned_tensors

    experts = read_layer(packed, model.folder, layer, model.device)
    before = experts.error(text)
    note = f"error {before:.3g} of the layer's output"
    if not experts.is_tuned:
        print(f"tune: layer {layer}: {note}; left as it is, all its codes are wide", file=sys.stderr, flush=True)
        return experts, {}
    descend(experts, text, options.steps, options.step_tokens, options.rate, options.seed + layer)
    after = experts.error(text)
    if not after < before:  # NaN, too
        print(f"tune: layer {layer}: {note}, {after:.3g} tuned; left as it is", file=sys.stderr, flush=True)
        return read_layer(packed, model.folder, layer, model.device), {}
    print(f"tune: layer {layer}: {note}, {after:.3g} tuned", file=sys.stderr, flush=True)
    return experts, tuned_tensors(packed, layer, experts)


def advance(
    options: TuneOptions, model: "StreamedModel", packed: "PackedFolder", streams: "tuple[Borders, Borders]", layer: int
) -> None:
    """Take both streams, of the original and the tuned model, through one layer; writes the file of what was tuned."""
    from mxmoe_steps.models.borders import forward, runs_of, unwatched
    from mxmoe_steps.models.rows import write_rows
    from mxmoe_steps.tuning.layer import passes
    from mxmoe_steps.tuning.reading import read_text

    original, tuned = streams
    sequences = len(options.texts) * options.sequences
    runs = runs_of([sequences], options.batch)
    forward(model, original, runs, layer + 1, unwatched, keep=True)
    if layer not in model.folder.moe_layers:
        forward(model, tuned, runs, layer + 1, unwatched, keep=True)
    else:
        with model.loaded(model.layer_path(layer)):
            held_out = sequences // _HELD_OUT * options.length
            captured = captured_files(options, layer)
            text = read_text(model, layer, tuned.hidden(layer), original.hidden(layer + 1), captured, runs, held_out)
        experts, tensors = tune_layer(options, model, packed, layer, text)
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with write_rows(layer_file(tuned, layer), layout, {"layer": layer}) as writer:
            for name, tensor in tensors.items():
                writer.append(name, tensor)
        with write_rows(tuned.hidden(layer + 1), tuned.layout, {"border": layer + 1}) as writer:
            for rows in passes(0, len(text.hidden), options.batch * options.length):
                output = experts.output(text, rows).to(model.dtype)
                writer.append("hidden", output.unflatten(0, (-1, options.length)))
    original.hidden(layer).unlink(missing_ok=True)
    tuned.hidden(layer).unlink()


def captured_files(options: TuneOptions, layer: int) -> list[Path]:
    """What `capture` wrote of a layer, by domain."""
    return [capture / f"layer-{layer:03d}.safetensors" for capture in options.capture]


def read_tokens(options: TuneOptions, path: Path) -> "Tensor":
    """The calibration text [S, L]: sequences of the domains in turn, so that those held out are of all."""
    import torch

    from mxmoe_steps.data.reading import read_texts

    found = read_texts(options, path, options.texts, "calibration")
    return in_turn(torch.stack([torch.from_numpy(found[text]) for text in options.texts]))


def in_turn(domains: "Tensor") -> "Tensor":
    """[D, S, ...] to [S D, ...]: the first sequence of every domain, then the second of every domain, ..."""
    return domains.transpose(0, 1).flatten(0, 1)


def check_captures(options: TuneOptions, folder: "ModelFolder") -> dict[int, list[Path]]:
    """The captured files of every layer; `UserError` unless they are of this model and, in order, of the texts."""
    from mxmoe_steps.calibration.inputs import check_domains

    captured = {layer: captured_files(options, layer) for layer in folder.moe_layers}
    for file in (file for files in captured.values() for file in files):
        if not file.is_file():
            raise UserError(f"{file}: no such captured layer; run the capture step for this model")
    by_domain = [dict(zip(captured, files, strict=True)) for files in zip(*captured.values(), strict=True)]
    domains = list(check_domains(by_domain, folder))
    if domains != options.texts:
        raise UserError(
            f"--capture is of {', '.join(domains)}, --texts are {', '.join(options.texts)}; give both in one order"
        )
    return captured


def layer_file(tuned: "Borders", layer: int) -> Path:
    """Where the tensors of a layer wait that was tuned."""
    return tuned.folder / f"layer-{layer:03d}.safetensors"


def write_checkpoint(options: TuneOptions, packed: "PackedFolder", files: Sequence[Path]) -> None:
    """The checkpoint with the tensors in ``files`` instead of its own."""
    from mxmoe_steps.evaluations import read_manifest
    from mxmoe_steps.models.raw import tensors_of
    from mxmoe_steps.models.shards import write_shards

    folder = packed.folder
    tensors = {name: folder.raw(name) for name in folder.files}
    for file in files:
        tensors |= tensors_of(file)
    with atomic_folder(options.out) as partial:
        write_shards(list(tensors.items()), partial)
        write_json(partial / "mxmoe.json", read_manifest(folder.path) | {"tuned": True})
        for file in (folder.path / "config.json", *folder.copied_files(code=True)):
            (partial / file.relative_to(folder.path)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, partial / file.relative_to(folder.path))


def tune(options: TuneOptions) -> None:
    """Tune the layers before ``options.until``, or all, and write the checkpoint."""
    import torch

    from mxmoe_steps.calibration.amount import warn_if_short
    from mxmoe_steps.evaluations import check_packed_from
    from mxmoe_steps.models.borders import Borders, forward, runs_of, unwatched
    from mxmoe_steps.models.families import open_model, resolve_model
    from mxmoe_steps.models.identity import fingerprint
    from mxmoe_steps.models.loading import start_torch
    from mxmoe_steps.models.streaming import StreamedModel
    from mxmoe_steps.tuning.blocks import is_tuned
    from mxmoe_steps.tuning.reading import PackedFolder

    start_torch(options)
    path = resolve_model(options.model, code=options.trust_remote_code)
    tokens = read_tokens(options, path)
    model = StreamedModel(path, options.dtype, options.device, options.trust_remote_code)
    if reason := model.folder.family.without_tuning:
        raise UserError(f"{path}: experts of this family are not tuned: {reason}; leave tuned out of the sweep")
    captured = check_captures(options, model.folder)
    checkpoint = open_model(options.checkpoint)
    check_packed_from(checkpoint, fingerprint(model.folder), options.model)
    StreamedModel(options.checkpoint, options.dtype, "cpu", options.trust_remote_code)  # refuses one that is not whole
    packed = PackedFolder(checkpoint, model.folder)
    warn_if_short(model.folder, tokens.numel())
    if wide := sorted(scheme.name for scheme in packed.schemes if not is_tuned(scheme)):
        print(f"tune: blocks of {', '.join(wide)} stay as they are", file=sys.stderr, flush=True)
    last = min(options.until or model.layers, model.layers)
    read = [*checkpoint.sources, *(file for files in captured.values() for file in files)]
    with Borders.locked(options):
        original, tuned = (
            Borders(model, tokens, "mxmoe_steps.tune", options, stream, read) for stream in ("original", "tuned")
        )
        reached = next((border for border in range(model.layers, -1, -1) if tuned.has(tuned.hidden(border))), None)
        if reached is None:
            forward(model, tuned, runs_of([len(tokens)], options.batch), 0, unwatched)
        for layer in range(reached or 0, last):
            try:
                advance(options, model, packed, (original, tuned), layer)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"layer {layer} does not fit in the GPU's memory: lower calibrate.sequences or tune.step_tokens,"
                    " run fewer jobs on the GPU at a time, or set runtime.device: cpu"
                ) from error
        if options.until is None:
            tuned_files = [layer_file(tuned, layer) for layer in model.folder.moe_layers]
            for file in tuned_files:
                if not file.is_file():
                    tuned.remove()
                    raise UserError(f"{file.name} was lost from {tuned.folder}; run tune again from the start")
            write_checkpoint(options, packed, tuned_files)
            shutil.rmtree(options.waiting_room)


def main() -> None:
    """Command line."""
    options = parse(TuneOptions, __doc__)
    with recorded(options.made_from, [options.out]) if options.until is None else nullcontext():
        tune(options)


if __name__ == "__main__":
    run_cli(main)
