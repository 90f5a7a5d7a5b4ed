"""Losses, traffic and profiles of made-up models, for tests and benchmarks of the allocation."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.identity import fingerprint
from mxmoe_steps.schemes import BLOCKS, SHARED, parse_scheme
from mxmoe_steps.tables import LOSSES, TRAFFIC, write_table

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "count",
    "odd",
]


def run(step: Any, *arguments: Any) -> None:
    """Run a step's main in this process."""
    old, sys.argv = sys.argv, ["step", *map(str, arguments)]
    try:
        step.main()
    finally:
        sys.argv = old


def allocation_of(assignment: list[list], quantizer: str, model: Path) -> dict[str, Any]:
    """What `solve` would say of an assignment [layer, expert, gate, up, down] of a model, but for made-up numbers."""
    facts = {
        "budget_bits": 16.0, "candidates": [], "device": "toy", "gap_limit": 0.0, "granularity": "block",
        "metric": "out_sq", "proved_by": "states", "quantizer": quantizer, "scope": "model", "time_is_estimate": True,
        "timed_as": {}, "tokens": 16, "traffic": {"phase": "auto", "seed": 0, "steps": 16, "texts": []},
        "constraints": {"fix": [], "max_schemes": None, "min_bits": [], "shared_tile": False, "tie_gate_up": False},
        "bits": 4.0, "bound": 1.0, "buys": [], "gap": 0.0, "loss": 1.0, "loss_form": "root_sum_squares",
        "max_loss": None,
        "max_time_us": None, "objective": 1.0, "price": 0.0, "r": 1.0, "status": "optimal", "tile_tokens": None,
        "time_us": 1.0,
        "domains": {"least_tokens": 0.0, "losses": {"toy": 1.0},
                    "no_worse_than_uniform": [], "objective": "sum", "uniform": {"toy": 1.0},
                    "weights": {}},
    }  # fmt: skip
    return facts | {"assignment": assignment, "model": fingerprint(open_model(model))}


def write_losses(
    folder: Path, schemes, layers=2, experts=4, hidden=256, wide=128, shared=256, seed=0, domains=("prose",)
) -> list[str]:
    """One table per scheme; ``shared`` is the shared expert's width, 0 for none. Returns the paths.

    Every block has a domain's share of its loss of its own.
    """
    generator = np.random.default_rng(seed)
    paths = []
    names = [SHARED] * bool(shared) + list(range(experts))
    size = generator.lognormal(0, 1, (layers, len(names), 3))
    share = np.random.default_rng(seed).dirichlet([0.3] * len(domains), (layers, len(names), 3))
    for text in schemes:
        scheme = parse_scheme(text)
        parts = [f"{loss}.{domain}" for loss in ("out_sq", "fisher") for domain in domains]
        columns: dict[str, list] = {name: [] for name in (*LOSSES.schema.names, *parts)}
        for layer in range(layers):
            for place, expert in enumerate(names):
                width = shared if expert == SHARED else wide
                for kind, block in enumerate(BLOCKS):
                    n, k = (hidden, width) if block == "down" else (width, hidden)
                    noise = generator.lognormal(0, 0.3)
                    loss = size[layer, place, kind] * (4.0**-scheme.weight_bits + 4.0**-scheme.act_bits) * noise
                    of_domain = share[layer, place, kind] * loss
                    row = (layer, expert, block, n, k, scheme.bits(k), 10, loss * 1e4, loss, False)
                    row += (*(of_domain * 1e4), *of_domain)
                    for name, value in zip(columns, row, strict=True):
                        columns[name].append(value)
        path = folder / f"{scheme.name}.parquet"
        facts = {"scheme": scheme.name, "quantizer": "rtn", "fisher": True, "model": "toy"}
        write_table(LOSSES, path, columns, facts | {"domains": dict.fromkeys(domains, 10)})
        paths.append(str(path))
    return paths


def write_trace(
    folder: Path, layers=2, experts=4, top_k=2, sequences=8, length=32, seed=0, texts=("prose",), model="toy"
) -> str:
    """A trace folder with skewed routing."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng(seed)
    routing = {}
    columns: dict[str, list] = {name: [] for name in TRAFFIC.schema.names}
    for text in texts:
        for layer in range(layers):
            taste = generator.normal(0, 1, experts) + generator.gumbel(0, 1, (sequences, length, experts))
            ids = np.argsort(-taste, axis=2)[..., :top_k].astype(np.int16)
            routing[f"{text}/{layer}"] = ids
            tokens = np.bincount(ids.ravel(), minlength=experts)
            for expert in range(experts):
                row = (text, layer, expert, int(tokens[expert]), tokens[expert] / ids.size, 1.0, 1.0, 0, 0.0, 0)
                for name, value in zip(columns, row, strict=True):
                    columns[name].append(value)
    facts = {
        "experts": experts, "layers": list(range(layers)), "length": length, "sequences": sequences,
        "texts": sorted(texts), "top_k": top_k, "model": model,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_table(TRAFFIC, folder / "traffic.parquet", columns, facts)
    save_file(routing, folder / "routing.safetensors", metadata={"mxmoe": canonical_json(facts)})
    return str(folder)
