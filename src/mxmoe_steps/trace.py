"""trace: which experts serve which text.

Runs several texts through the model, one decoder layer in memory at a time, and writes a folder with
  traffic.parquet      tokens, share and router weights per text, layer and expert
  routing.safetensors  the expert ids of every token, int16 [sequences, length, k] per text and layer,
                       from which `frontier` samples the steps that a server will see

A run that was stopped goes on at the last finished layer. --until K stops at layer K, so that a chain of jobs with
rising K and the same --out, the last one without --until, does the work of one: same bytes.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mxmoe_steps.arguments import (
    add_borders,
    add_model,
    add_runtime,
    add_text,
    folder_to_write,
    parser_for,
    positive,
)
from mxmoe_steps.errors import run_cli
from mxmoe_steps.made_from import recorded


def trace_layers(model: Any, borders: Any, runs: list[slice], last: int) -> None:
    """Route the borders' text through layers 0 ... last - 1; keeps each layer's routing beside the borders."""
    import torch

    from mxmoe_steps.models.borders import forward
    from mxmoe_steps.models.rows import write_rows

    @contextmanager
    def watch(layer: int) -> Iterator[Any]:
        found: list[Any] = []
        yield found.append
        ids = torch.cat([ids.to("cpu", torch.int16) for _, ids, _ in found]).view(*borders.tokens.shape, -1)
        weights = torch.cat([weights.to("cpu", torch.float32) for _, _, weights in found]).view(ids.shape)
        print(f"trace: layer {layer}", file=sys.stderr, flush=True)
        layout = {"ids": (torch.int16, ids.shape), "weights": (torch.float32, ids.shape)}
        with write_rows(routing_file(borders, layer), layout, {"layer": layer}) as writer:
            writer.append("ids", ids)
            writer.append("weights", weights)

    forward(model, borders, runs, last, watch)


def routing_file(borders: Any, layer: int) -> Path:
    """Where a traced layer waits for the last: ids and weights [S, L, k] of all texts."""
    return Path(borders.folder / f"routing-{layer:03d}.safetensors")


def traffic_rows(text: str, layer: int, ids: Any, weights: Any, experts: int) -> dict[str, list[Any]]:
    """`tables.TRAFFIC` columns of one text and layer from ids and weights [S, L, k]."""
    import torch

    flat = ids.long().flatten()
    per_sequence = torch.stack([torch.bincount(row.long().flatten(), minlength=experts) for row in ids])  # [S, E]
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


def write_traffic(args: argparse.Namespace, folder: Any, borders: Any) -> None:
    """Both files of the step from what every layer left beside the borders."""
    from safetensors.torch import load_file

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
        for number, text in enumerate(args.texts):
            ids, weights = (found[name].split(args.sequences)[number] for name in ("ids", "weights"))
            routing[f"{text}/{layer}"] = ids
            for name, values in traffic_rows(text, layer, ids, weights, folder.experts).items():
                columns[name] += values
    facts = {
        "experts": folder.experts,
        "layers": folder.moe_layers,
        "length": args.length,
        "model": fingerprint(folder),
        "sequences": args.sequences,
        "texts": sorted(args.texts),
        "top_k": ids.shape[-1],
    }
    out = Path(args.out)
    write_table(TRAFFIC, out / "traffic.parquet", columns, facts)
    layout = {name: (ids.dtype, tuple(ids.shape)) for name, ids in routing.items()}
    with write_rows(out / "routing.safetensors", layout, facts) as writer:
        for name, ids in routing.items():
            writer.append(name, ids)


def trace(args: argparse.Namespace) -> None:
    """Trace every text of ``args.texts``."""
    import torch

    from mxmoe_steps.data.reading import read_texts
    from mxmoe_steps.models.borders import Borders, runs_of
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.loading import start_torch
    from mxmoe_steps.models.streaming import StreamedModel

    start_torch(args)
    path = resolve_model(args.model, code=args.trust_remote_code)
    found = read_texts(args, path, args.texts, "calibration")
    tokens = torch.cat([torch.from_numpy(found[text]) for text in args.texts])
    model = StreamedModel(path, args.dtype, args.device, args.trust_remote_code)
    runs = runs_of([args.sequences] * len(args.texts), args.batch)
    end = model.folder.moe_layers[-1] + 1
    with Borders.locked(args):
        borders = Borders(model, tokens, "mxmoe_steps.trace", args)
        trace_layers(model, borders, runs, min(args.until or end, end))
        if args.until is None:
            try:
                write_traffic(args, model.folder, borders)
            finally:  # also what turned out to be damaged
                borders.remove()


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    add_model(parser)
    add_text(parser, several=True)
    add_runtime(parser)
    add_borders(parser)
    parser.add_argument("--until", type=positive, metavar="K", help="stop when layers 0 ... K-1 are done")
    parser.add_argument("--out", type=folder_to_write, required=True, help="folder to write")
    args = parser.parse_args()
    outputs = [Path(args.out) / name for name in ("traffic.parquet", "routing.safetensors")]
    with recorded(args.made_from, outputs) if args.until is None else nullcontext():
        trace(args)


if __name__ == "__main__":
    run_cli(main)
