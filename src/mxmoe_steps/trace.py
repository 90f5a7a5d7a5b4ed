"""trace: which experts serve which text.

Runs several texts through the model, one decoder layer in memory at a time, and writes a folder with
  traffic.parquet      tokens, share and router weights per text, layer and expert
  routing.safetensors  the expert ids of every token, int16 [sequences, length, k] per text and layer,
                       from which `frontier` samples the steps that a server will see

A run that was stopped goes on at the last finished layer. --until K stops at layer K, so that a chain of jobs with
rising K and the same --out, the last one without --until, does the work of one: same bytes.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mxmoe_steps.errors import run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Count, Flag, Names
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import TextAmount, TextThroughModel

if TYPE_CHECKING:
    from torch import Tensor

    from mxmoe_steps.models.borders import Borders, Routing, Seen
    from mxmoe_steps.models.families import ModelFolder
    from mxmoe_steps.models.streaming import StreamedModel


class TracedTexts(TextAmount):
    """Expert traffic."""

    texts: Names = Field(description="text sources to trace", min_length=1)


class TraceOptions(TracedTexts, TextThroughModel):
    """Options of the step."""

    until: Annotated[Count | None, Flag("LAYER", decides=False)] = Field(
        None, description="stop when the layers before this one are done"
    )


def trace_layers(model: "StreamedModel", borders: "Borders", runs: list[slice], last: int) -> None:
    """Route the borders' text through layers 0 ... last - 1; keeps each layer's routing beside the borders."""
    import torch

    from mxmoe_steps.models.borders import forward
    from mxmoe_steps.models.rows import write_rows

    @contextmanager
    def watch(layer: int) -> "Iterator[Seen]":
        found: list[Routing] = []
        yield found.append
        by_batch = [expert_ids.to("cpu", torch.int16) for _, expert_ids, _ in found]
        expert_ids = torch.cat(by_batch).view(*borders.tokens.shape, -1)
        weights = torch.cat([weights.to("cpu", torch.float32) for _, _, weights in found]).view(expert_ids.shape)
        print(f"trace: layer {layer}", file=sys.stderr, flush=True)
        layout = {"ids": (torch.int16, expert_ids.shape), "weights": (torch.float32, expert_ids.shape)}
        with write_rows(routing_file(borders, layer), layout, {"layer": layer}) as writer:
            writer.append("ids", expert_ids)
            writer.append("weights", weights)

    forward(model, borders, runs, last, watch)


def routing_file(borders: "Borders", layer: int) -> Path:
    """Where a traced layer waits for the last: expert ids and weights [S, L, k] of all texts."""
    return borders.folder / f"routing-{layer:03d}.safetensors"


def traffic_rows(text: str, layer: int, expert_ids: "Tensor", weights: "Tensor", experts: int) -> dict[str, list[Any]]:
    """`tables.TRAFFIC` columns of one text and layer from expert ids and weights [S, L, k]."""
    import torch

    flat = expert_ids.long().flatten()
    counts = [torch.bincount(row.long().flatten(), minlength=experts) for row in expert_ids]
    per_sequence = torch.stack(counts)  # [S, E]
    tokens = per_sequence.sum(0)
    weight = weights.double().flatten()
    return {
        "text": [text] * experts,
        "layer": [layer] * experts,
        "expert": list(range(experts)),
        "tokens": tokens.tolist(),
        "share": (tokens.double() / flat.numel()).tolist(),
        "weight_sum": torch.bincount(flat, weight, minlength=experts).tolist(),
        "weight_sq_sum": torch.bincount(flat, weight.square(), minlength=experts).tolist(),
        "sequence_tokens_min": per_sequence.amin(0).tolist(),
        "sequence_tokens_p50": per_sequence.double().quantile(0.5, dim=0).tolist(),
        "sequence_tokens_max": per_sequence.amax(0).tolist(),
    }


def write_traffic(options: TraceOptions, folder: "ModelFolder", borders: "Borders") -> None:
    """Both files of the step from what every layer left beside the borders."""
    from safetensors.torch import load_file

    from mxmoe_steps.models.gating import kernel_gating
    from mxmoe_steps.models.identity import fingerprint
    from mxmoe_steps.models.raw import tensors_of
    from mxmoe_steps.models.rows import write_rows
    from mxmoe_steps.tables import TRAFFIC, write_table

    columns: dict[str, list[Any]] = {name: [] for name in TRAFFIC.schema.names}
    routing = {}
    for layer in folder.moe_layers:
        for tensor in tensors_of(routing_file(borders, layer)).values():
            tensor.check()
        found = load_file(routing_file(borders, layer))
        for number, text in enumerate(options.texts):
            expert_ids, weights = (found[name].split(options.sequences)[number] for name in ("ids", "weights"))
            routing[f"{text}/{layer}"] = expert_ids
            for name, values in traffic_rows(text, layer, expert_ids, weights, folder.experts).items():
                columns[name] += values
    gating = kernel_gating(folder.family, folder.text)
    facts = {
        **({} if gating.plain else {"activation": gating.variant}),
        "experts": folder.experts,
        "layers": folder.moe_layers,
        "length": options.length,
        "model": fingerprint(folder),
        "sequences": options.sequences,
        "texts": sorted(options.texts),
        "top_k": expert_ids.shape[-1],
    }
    out = options.out
    write_table(TRAFFIC, out / "traffic.parquet", columns, facts)
    layout = {name: (expert_ids.dtype, tuple(expert_ids.shape)) for name, expert_ids in routing.items()}
    with write_rows(out / "routing.safetensors", layout, facts) as writer:
        for name, expert_ids in routing.items():
            writer.append(name, expert_ids)


def trace(options: TraceOptions) -> None:
    """Trace every text of ``options.texts``."""
    import torch

    from mxmoe_steps.data.reading import read_texts
    from mxmoe_steps.models.borders import Borders, runs_of
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.loading import start_torch
    from mxmoe_steps.models.streaming import StreamedModel

    start_torch(options)
    path = resolve_model(options.model, code=options.trust_remote_code)
    found = read_texts(options, path, options.texts, "calibration")
    tokens = torch.cat([torch.from_numpy(found[text]) for text in options.texts])
    model = StreamedModel(path, options.dtype, options.device, options.trust_remote_code)
    runs = runs_of([options.sequences] * len(options.texts), options.batch)
    end = model.folder.moe_layers[-1] + 1
    with Borders.locked(options):
        borders = Borders(model, tokens, "mxmoe_steps.trace", options)
        trace_layers(model, borders, runs, min(options.until or end, end))
        if options.until is None:
            try:
                write_traffic(options, model.folder, borders)
            finally:  # also what turned out to be damaged
                borders.remove()


def main() -> None:
    """Command line."""
    options = parse(TraceOptions, __doc__)
    outputs = [options.out / name for name in ("traffic.parquet", "routing.safetensors")]
    with recorded(options.made_from, outputs) if options.until is None else nullcontext():
        trace(options)


if __name__ == "__main__":
    run_cli(main)
