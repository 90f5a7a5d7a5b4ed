"""capture: what enters every MoE layer on a calibration text, which is one domain.

Runs the text through the model, one decoder layer in memory at a time, and writes one file per MoE layer,
layer-NNN.safetensors:
  hidden    [T, H]  input of the experts, in the model's precision
  ids       [T, k]  experts of each token, int16
  weights   [T, k]  router weights, float32
  shared    [T]     factor of the shared expert's output, float32 (families that have one)
  gradient  [T, H]  gradient of the loss with respect to the layer's output, in the model's precision
                    (unless --no-gradient)

`calibrate` reads nothing else of the model's activations, so every scheme, quantizer and layer can be
calibrated as a job of its own. The loss is the negative log-likelihood of next tokens drawn from the
model itself: the squared gradient then is the Fisher information of its predictions, and
1/2 (gradient . change)^2 estimates the KL divergence that a change of the layer's output causes.

The gradient costs a second pass, from the last layer to the first, each recomputed from the hidden states at
its border. A run that was stopped goes on at the last finished layer. Parts of the work can be jobs of their own,
with the same --out: --until K with rising K, --down-to K with falling K (not with --no-gradient), and last a
run without either. The bytes are those of one job.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from mxmoe_steps.atomic import atomic_folder
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Count, Flag, Natural
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import CalibrationAmount, TextThroughModel

if TYPE_CHECKING:
    from torch import Tensor

    from mxmoe_steps.models.borders import Borders, Routing, Seen
    from mxmoe_steps.models.streaming import StreamedModel


class CapturedText(CalibrationAmount):
    """What is captured of calibration text."""

    text: Annotated[str, Flag("NAME")] = Field(description="text source to calibrate on")
    gradient: bool = Field(True, description="also run a backward pass, which the fisher metric needs")


class CaptureOptions(CapturedText, TextThroughModel):
    """Options of the step."""

    until: Annotated[Count | None, Flag("LAYER", decides=False)] = Field(
        None, description="only bring the text up to this layer"
    )
    down_to: Annotated[Natural | None, Flag("LAYER", decides=False)] = Field(
        None, description="only bring the gradient down to this layer"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.down_to is not None and not self.gradient:
            raise ValueError("--down-to is about gradients; leave it out with --no-gradient")
        return self

    @property
    def is_last(self) -> bool:
        """Whether this is the job that writes the result."""
        return self.until is None and self.down_to is None


def captured(model: "StreamedModel", layer: int, routing: "Routing") -> "dict[str, Tensor]":
    """What a layer's file says of one run of tokens; within ``model.loaded`` of the layer."""
    import torch

    hidden, expert_ids, weights = (tensor.detach() for tensor in routing)
    tensors = {"hidden": hidden, "ids": expert_ids.to(torch.int16), "weights": weights.float()}
    if (factor := model.shared_factor(layer, hidden)) is not None:
        tensors["shared"] = factor
    return tensors


@contextmanager
def layer_file(
    borders: "Borders", layer: int, facts: dict[str, Any]
) -> "Iterator[Callable[[dict[str, Tensor]], None]]":
    """Yields what to call with the tensors of every run; the layer's file waits beside the borders."""
    from mxmoe_steps.models.rows import write_rows

    with ExitStack() as stack:
        writer: Any = None

        def write(tensors: "dict[str, Tensor]") -> None:
            nonlocal writer
            if writer is None:
                rows = borders.tokens.numel()
                layout = {name: (tensor.dtype, (rows, *tensor.shape[1:])) for name, tensor in tensors.items()}
                path = borders.folder / f"layer-{layer:03d}.safetensors"
                writer = stack.enter_context(write_rows(path, layout, facts | {"layer": layer}))
            for name, tensor in tensors.items():
                writer.append(name, tensor)

        yield write
    print(f"capture: layer {layer}", file=sys.stderr, flush=True)


def head_gradient(model: "StreamedModel", borders: "Borders", runs: list[slice], seed: int) -> None:
    """Write the loss's gradient at the last border: labels drawn from the model, a few tokens' logits at a time."""
    import torch

    from mxmoe_steps.models.rows import read_rows, write_rows

    generator = torch.Generator(model.device).manual_seed(seed)
    target = write_rows(borders.gradient(model.layers), borders.layout, {"border": model.layers})
    with model.head(), target as writer, torch.enable_grad():
        for run in runs:
            hidden = read_rows(borders.hidden(model.layers), "hidden", run).to(model.device)
            gradients = []
            for rows in hidden.flatten(0, 1).split(model.head_rows):
                rows.requires_grad_()
                log_probs = model.log_probs(model.final_norm(rows))
                labels = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
                gradients += torch.autograd.grad(-log_probs.gather(-1, labels).sum(), rows)
            writer.append("hidden", torch.cat(gradients).view(hidden.shape))


def backward(model: "StreamedModel", borders: "Borders", runs: list[slice], layer: int, facts: dict[str, Any]) -> None:
    """Take the gradient from border ``layer`` + 1 to border ``layer``; writes the layer's file where it has experts."""
    import torch

    from mxmoe_steps.models.borders import hooked
    from mxmoe_steps.models.gradients import gradients
    from mxmoe_steps.models.rows import read_rows, write_rows

    has_experts = layer in model.folder.moe_layers
    probes: list[Tensor] = []
    found: list[Routing] = []

    def add_probe(_module: Any, _args: Any, output: Any) -> Any:
        summed = output[0] if isinstance(output, tuple) else output
        probes.append(torch.zeros_like(summed, requires_grad=True))
        return (summed + probes[0], *output[1:]) if isinstance(output, tuple) else summed + probes[0]

    with ExitStack() as stack:
        stack.enter_context(model.loaded(model.layer_path(layer)))
        target = write_rows(borders.gradient(layer), borders.layout, {"border": layer})
        writer = stack.enter_context(target)
        write = stack.enter_context(layer_file(borders, layer, facts)) if has_experts else None
        if has_experts:
            stack.enter_context(hooked(model, layer, found.append))
            stack.callback(model.summing(layer).register_forward_hook(add_probe).remove)
        for run in runs:
            probes.clear()
            found.clear()
            hidden = read_rows(borders.hidden(layer), "hidden", run).to(model.device).requires_grad_()
            above = read_rows(borders.gradient(layer + 1), "hidden", run).to(model.device)
            with torch.enable_grad():
                output = model.run_layer(layer, hidden)
            below, *gradient = gradients(output, [hidden, *probes], above)
            if not below.isfinite().all():
                raise UserError(
                    f"{model.folder.path}: layer {layer}: the loss's gradient holds NaN or infinity in {model.dtype};"
                    " set model.dtype to bfloat16 or float32, or calibrate.gradient to false"
                )
            writer.append("hidden", below)
            if write is not None:
                write(captured(model, layer, found[0]) | {"gradient": gradient[0].reshape(-1, gradient[0].shape[-1])})


def capture_forward(
    model: "StreamedModel", borders: "Borders", runs: list[slice], last: int, facts: dict[str, Any]
) -> None:
    """Capture layers 0 ... last - 1 without gradients."""
    from mxmoe_steps.models.borders import forward

    @contextmanager
    def watch(layer: int) -> "Iterator[Seen]":
        with layer_file(borders, layer, facts) as write:
            yield lambda routing: write(captured(model, layer, routing))

    forward(model, borders, runs, last, watch)


def capture_backward(
    model: "StreamedModel", borders: "Borders", runs: list[slice], first: int, facts: dict[str, Any], seed: int
) -> None:
    """Capture with gradients, from the last layer, or from where an earlier run stopped, down to layer ``first``."""
    from mxmoe_steps.models.borders import forward, unwatched

    reached = next((border for border in range(model.layers + 1) if borders.has(borders.gradient(border))), None)
    resumed = reached is not None
    if reached is None:
        forward(model, borders, runs, model.layers, unwatched, keep=True)
        head_gradient(model, borders, runs, seed)
        reached = model.layers
    for layer in reversed(range(first, reached)):
        if resumed and not borders.has(borders.hidden(layer)):
            forward(model, borders, runs, layer, unwatched, keep=True)
        backward(model, borders, runs, layer, facts)
        borders.hidden(layer + 1).unlink(missing_ok=True)
        borders.gradient(layer + 1).unlink(missing_ok=True)


def capture(options: CaptureOptions) -> None:
    """Capture every MoE layer of the model on one text."""
    import torch

    from mxmoe_steps.data.reading import read_texts
    from mxmoe_steps.models.borders import Borders, forward, runs_of, unwatched
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.identity import fingerprint
    from mxmoe_steps.models.loading import start_torch
    from mxmoe_steps.models.streaming import StreamedModel

    start_torch(options)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass of attention has no deterministic form
    path = resolve_model(options.model, code=options.trust_remote_code)
    tokens = torch.from_numpy(read_texts(options, path, [options.text], "calibration")[options.text])
    model = StreamedModel(path, options.dtype, options.device, options.trust_remote_code)
    runs = runs_of([options.sequences], options.batch)
    facts = {"text": options.text, "sequences": options.sequences, "length": options.length}
    facts |= {"model": fingerprint(model.folder)}
    with Borders.locked(options):
        borders = Borders(model, tokens, "mxmoe_steps.capture", options)
        if not options.gradient:
            capture_forward(model, borders, runs, min(options.until or model.layers, model.layers), facts)
        elif options.until is not None:
            forward(model, borders, runs, min(options.until, model.layers), unwatched, keep=True)
        else:
            capture_backward(model, borders, runs, options.down_to or 0, facts, options.seed)
        if options.is_last:
            finish(model, borders, options.out)


def finish(model: "StreamedModel", borders: "Borders", out: Path) -> None:
    """Put the layers' files in their place, all at once; `UserError` if one of an earlier run is gone."""
    files = [borders.folder / f"layer-{layer:03d}.safetensors" for layer in model.folder.moe_layers]
    for file in files:
        if not file.is_file():
            borders.remove()
            raise UserError(f"{file.name} was lost from {borders.folder}; run capture again from the start")
    with atomic_folder(out) as folder:
        for file in files:
            try:
                os.link(file, folder / file.name)
            except OSError:  # another disk, or one without hard links
                shutil.copyfile(file, folder / file.name)
    borders.remove()


def main() -> None:
    """Command line."""
    options = parse(CaptureOptions, __doc__)
    with recorded(options.made_from, [options.out]) if options.is_last else nullcontext():
        capture(options)


if __name__ == "__main__":
    run_cli(main)
