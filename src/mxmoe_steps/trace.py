"""trace: which experts serve which text.

Runs the model over several texts and writes a folder with
  traffic.parquet      tokens, share and router weights per text, layer and expert
  routing.safetensors  the expert ids of every token, int16 [sequences, length, k] per text and layer,
                       from which `frontier` samples the steps that a server will see
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from mxmoe_steps.arguments import add_model, add_runtime, add_text, parser_for, start_torch
from mxmoe_steps.atomic import atomic_path, canonical_json
from mxmoe_steps.errors import run_cli


def trace_text(folder: Any, model: Any, tokens: Any, batch: int) -> tuple[dict[int, Any], dict[int, Any]]:
    """Route ``tokens`` int64 [S, L]; returns per layer expert ids int16 [S, L, k] and weights float32 [S, L, k]."""
    import torch

    from mxmoe_steps.models.loading import expert_hooks

    ids: dict[int, list[Any]] = {layer: [] for layer in folder.moe_layers}
    weights: dict[int, list[Any]] = {layer: [] for layer in folder.moe_layers}

    def seen(layer: int, routing: Any) -> None:
        ids[layer].append(routing[1].to("cpu", torch.int16))
        weights[layer].append(routing[2].to("cpu", torch.float32))

    with torch.inference_mode(), expert_hooks(folder, model, seen):
        for chunk in torch.from_numpy(tokens).split(batch):
            model.model(input_ids=chunk.to(model.device), use_cache=False)
    shape = (*tokens.shape, -1)
    return (
        {layer: torch.cat(parts).view(shape) for layer, parts in ids.items()},
        {layer: torch.cat(parts).view(shape) for layer, parts in weights.items()},
    )


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


def trace(args: argparse.Namespace) -> None:
    """Trace every text of ``args.texts`` with one loaded model."""
    from safetensors.torch import save_file

    from mxmoe_steps.data.reading import read_texts
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.loading import load_model
    from mxmoe_steps.tables import TRAFFIC, write_table

    start_torch(args)
    path = resolve_model(args.model)
    tokens = read_texts(args, path, args.texts, "calibration")
    folder, model = load_model(path, args.dtype, args.device, args.trust_remote_code)
    columns: dict[str, list[Any]] = {name: [] for name in TRAFFIC.schema.names}
    routing = {}
    for text in args.texts:
        print(f"trace {text}: {args.sequences} sequences of {args.length} tokens", file=sys.stderr, flush=True)
        ids, weights = trace_text(folder, model, tokens[text], args.batch)
        for layer in folder.moe_layers:
            routing[f"{text}/{layer}"] = ids[layer]
            for name, values in traffic_rows(text, layer, ids[layer], weights[layer], folder.experts).items():
                columns[name] += values
    facts = {
        "experts": folder.experts,
        "layers": folder.moe_layers,
        "length": args.length,
        "sequences": args.sequences,
        "texts": sorted(args.texts),
        "top_k": routing[f"{args.texts[0]}/{folder.moe_layers[0]}"].shape[-1],
    }
    out = Path(args.out)
    write_table(TRAFFIC, out / "traffic.parquet", columns, facts)
    with atomic_path(out / "routing.safetensors") as temporary:
        save_file(routing, temporary, metadata={"mxmoe": canonical_json(facts)})


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    add_model(parser)
    add_text(parser, several=True)
    add_runtime(parser)
    parser.add_argument("--out", required=True, help="folder to write")
    trace(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
