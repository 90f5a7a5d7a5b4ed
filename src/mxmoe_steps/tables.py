"""Schema, reader and writer of every parquet artifact. pyarrow only, so that `solve` never loads torch.

Rows are sorted by the key columns and no time or host name is stored: equal inputs give equal bytes.
A table's facts that are not rows (device, text names, ...) travel as one canonical JSON string in
the schema metadata under ``mxmoe``.
"""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mxmoe_steps.atomic import atomic_path, canonical_json
from mxmoe_steps.errors import UserError

_METADATA_KEY = b"mxmoe"


@dataclass(frozen=True)
class TableKind:
    """Name, version, columns and sort keys of one kind of table."""

    name: str
    version: int
    schema: pa.Schema
    keys: tuple[str, ...]


TRAFFIC = TableKind(  # written by trace
    "traffic",
    1,
    pa.schema(
        [
            ("text", pa.string()),  # name of the text source
            ("layer", pa.int32()),  # decoder layer index
            ("expert", pa.int32()),  # routed experts only
            ("tokens", pa.int64()),  # tokens routed to the expert
            ("share", pa.float64()),  # tokens / (all tokens x top-k): sums to 1 over a layer
            ("weight_sum", pa.float64()),  # sum of router weights
            ("weight_sq_sum", pa.float64()),  # sum of squared router weights
            ("sequence_tokens_min", pa.int64()),  # fewest tokens the expert got in one sequence
            ("sequence_tokens_p50", pa.float64()),
            ("sequence_tokens_max", pa.int64()),
        ]
    ),
    ("text", "layer", "expert"),
)

LOSSES = TableKind(  # written by calibrate, one table per quantizer and scheme
    "losses",
    1,
    pa.schema(
        [
            ("layer", pa.int32()),
            ("expert", pa.int32()),  # -1: the layer's shared expert
            ("block", pa.string()),  # gate, up or down
            ("out_features", pa.int64()),
            ("in_features", pa.int64()),
            ("bits", pa.float64()),  # true bits per weight of this block, scales and zero points counted
            ("tokens", pa.int64()),  # calibration tokens the expert saw
            ("out_sq", pa.float64()),  # sum over tokens of ||change of the layer output||^2
            ("fisher", pa.float64()),  # 1/2 mean over tokens of (gradient . change)^2: KL in nats per token
            ("fallback", pa.bool_()),  # too few tokens for statistics of its own: mostly the layer's were used
        ]
    ),
    ("layer", "expert", "block"),
)

MEASUREMENTS = TableKind(  # written by measure: one row per timed launch
    "measurements",
    1,
    pa.schema(
        [
            ("number", pa.int32()),
            ("kind", pa.string()),  # tile: all problems are one and stay in the L2 cache; problem: a random layer's
            ("model", pa.string()),  # whose shapes and routing
            ("block", pa.string()),  # gate_up or down
            ("tokens", pa.int32()),  # routed tokens; rows of a tile
            ("out_features", pa.int32()),
            ("in_features", pa.int32()),
            ("phase", pa.string()),  # which kernel: latency, decode or prefill
            ("apart", pa.bool_()),  # one launch per scheme, back to back
            ("carried", pa.list_(pa.string())),  # schemes that the kernel was compiled for
            ("experts", pa.int32()),
            ("rows", pa.list_(pa.int32())),  # of every problem
            ("schemes", pa.list_(pa.string())),  # of every problem
            ("us", pa.list_(pa.float64())),  # microseconds in every round
        ]
    ),
    ("number",),
)

PROFILE = TableKind(  # written by profile, one table per GPU
    "profile",
    2,
    pa.schema(
        [
            ("phase", pa.string()),  # which kernel: latency, decode or prefill
            ("scheme", pa.string()),
            (
                "tile_tokens",
                pa.int32(),
            ),  # tokens per output tile; weight rows follow from the phase (formats.PHASE_ROWS)
            ("tile_us", pa.float64()),  # fixed time of one tile on one SM, microseconds
            ("kstep_us", pa.float64()),  # time per 128 input features of one tile on one SM
            ("spread", pa.float64()),  # (most - least) / median over the rounds of measuring; 0 for an estimate
        ]
    ),
    ("phase", "scheme", "tile_tokens"),
)


def write_table(
    kind: TableKind, path: str | PathLike[str], columns: dict[str, list[Any]], facts: dict[str, Any]
) -> None:
    """Write ``columns`` sorted by the kind's keys, with ``facts`` in the metadata, atomically."""
    table = pa.table(columns, schema=kind.schema).sort_by([(key, "ascending") for key in kind.keys])
    metadata = canonical_json({"kind": kind.name, "version": kind.version, "facts": facts})
    table = table.replace_schema_metadata({_METADATA_KEY: metadata.encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_statistics=False, store_schema=True)


def read_table(kind: TableKind, path: str | PathLike[str]) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table and its facts; `UserError` when it is missing, of another kind or another version."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such {kind.name} table; run the step that writes it")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from error
    try:
        metadata = json.loads((table.schema.metadata or {})[_METADATA_KEY])
    except (KeyError, json.JSONDecodeError):
        raise UserError(f"{path}: not written by this tool; expected a {kind.name} table") from None
    found = (metadata["kind"], metadata["version"])
    if found != (kind.name, kind.version):
        raise UserError(
            f"{path}: is a {found[0]} table of version {found[1]}; expected {kind.name} version {kind.version}"
        )
    if not table.schema.equals(kind.schema, check_metadata=False):
        raise UserError(f"{path}: columns differ from those of a {kind.name} table of version {kind.version}")
    return table, metadata["facts"]
