"""Schema, reader and writer of every parquet artifact. pyarrow only, so that `solve` never loads torch.

Rows are sorted by the key columns and no time or host name is stored: equal inputs give equal bytes.
A table's facts that are not rows (device, text names, ...) travel as one canonical JSON string in
the schema metadata under ``mxmoe``, with a checksum of facts and rows.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NotRequired

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from mxmoe_steps.atomic import atomic_path, canonical_json
from mxmoe_steps.errors import UserError
from mxmoe_steps.facts import LossFacts, MeasurementFacts, ProfileFacts, ThroughputFacts, TimeFacts, TrafficFacts
from mxmoe_steps.records import STRICT, parse_record
from mxmoe_steps.schemes import BLOCKS, SHARED, is_canonical

_METADATA_KEY = b"mxmoe"
_INDEX, _COUNT = (0, 2**31 - 1), (1, 2**31 - 1)
_QUANTITY, _SHARE = (0.0, 1e100), (0.0, 1.0)


@dataclass(frozen=True)
class TableKind:
    """Name, version, columns and sort keys of one kind of table, and the step that writes it.

    ``facts``: schema of what is not rows. ``limits``: least and most of a column's numbers, in lists too;
    ``choices``: the only texts of a column; ``schemes``: columns of canonical scheme names.
    """

    name: str
    step: str
    version: int
    schema: pa.Schema
    keys: tuple[str, ...]
    facts: Any
    limits: Mapping[str, tuple[float, float]]
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    schemes: tuple[str, ...] = ()
    least_rows: int = 1
    more: bool = False  # columns of quantities may follow

    def schema_of(self, names: Iterable[str]) -> pa.Schema:
        """Of a table with these columns."""
        more = sorted(set(names) - set(self.schema.names)) if self.more else []
        return pa.schema([*self.schema, *((name, pa.float64()) for name in more)])


class _Header(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    kind: str
    version: int
    facts: dict[str, Any]
    sha256: NotRequired[str]  # tables of earlier releases have none


TRAFFIC = TableKind(  # written by trace
    "traffic",
    "trace",
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
    TrafficFacts,
    {
        "layer": _INDEX,
        "expert": _INDEX,
        "tokens": (0, 2**63 - 1),
        "share": _SHARE,
        "weight_sum": _QUANTITY,
        "weight_sq_sum": _QUANTITY,
        "sequence_tokens_min": (0, 2**63 - 1),
        "sequence_tokens_p50": _QUANTITY,
        "sequence_tokens_max": (0, 2**63 - 1),
    },
)

LOSSES = TableKind(  # written by calibrate, one table per quantizer and scheme
    "losses",
    "calibrate",
    2,
    pa.schema(
        [
            ("layer", pa.int32()),
            ("expert", pa.int32()),  # -1: the layer's shared expert
            ("block", pa.string()),  # gate, up or down
            ("out_features", pa.int64()),  # 0: gate of experts without one
            ("in_features", pa.int64()),
            ("bits", pa.float64()),  # true bits per weight of this block, scales and zero points counted
            ("tokens", pa.int64()),  # calibration tokens the expert saw
            ("out_sq", pa.float64()),  # sum over tokens of ||change of the layer output||^2
            ("fisher", pa.float64()),  # 1/2 mean over tokens of (gradient . change)^2: KL in nats per token
            ("fallback", pa.bool_()),  # too few tokens for statistics of its own: mostly the layer's were used
        ]
    ),
    ("layer", "expert", "block"),
    LossFacts,
    {
        "layer": _INDEX,
        "expert": (SHARED, 2**31 - 1),
        "out_features": (0, 2**63 - 1),
        "in_features": _COUNT,
        "bits": (0.0, 64.0),
        "tokens": (0, 2**63 - 1),
        "out_sq": _QUANTITY,
        "fisher": _QUANTITY,
    },
    {"block": BLOCKS},
    more=True,  # losses that a user's modules add; LOSS.DOMAIN: the part of a loss that is of a domain's tokens
)

NOT_LOSSES = frozenset(LOSSES.schema.names) - {"out_sq", "fisher"}  # columns

MEASUREMENTS = TableKind(  # written by measure: one row per timed launch
    "measurements",
    "measure",
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
    MeasurementFacts,
    {
        "number": _INDEX,
        "tokens": _COUNT,
        "out_features": _COUNT,
        "in_features": _COUNT,
        "experts": _COUNT,
        "rows": _INDEX,
        "us": (1e-3, 1e9),
    },
    {"kind": ("tile", "problem"), "block": ("gate_up", "down")},
    schemes=("carried", "schemes"),
    least_rows=0,  # of a GPU that has no kernels
)

TIMES = TableKind(  # written by time: one row per timed launch, or sequence of launches, of a checkpoint's layer
    "times",
    "time",
    1,
    pa.schema(
        [
            ("checkpoint", pa.string()),  # or original
            ("layer", pa.int32()),
            ("tokens", pa.int32()),  # in a step
            ("step", pa.int32()),  # which of the sampled steps
            (
                "stage",
                pa.string(),
            ),  # a launch, or layer; of the original an implementation of transformers
            ("us", pa.list_(pa.float64())),  # microseconds in every round
        ]
    ),
    ("checkpoint", "layer", "tokens", "step", "stage"),
    TimeFacts,
    {"layer": _INDEX, "tokens": _COUNT, "step": _INDEX, "us": (1e-3, 1e9)},
    least_rows=0,  # of layers that have no kernels
)

THROUGHPUT = TableKind(  # written by time: one row per model and kind of step of the whole model
    "throughput",
    "time",
    1,
    pa.schema(
        [
            ("checkpoint", pa.string()),  # or original
            ("phase", pa.string()),  # of the step: decode or prefill
            ("tokens", pa.int32()),  # in a step, as they were asked for
            ("made", pa.int32()),  # that a step really has: a prefill's sequences are of one length
            ("prompt", pa.int32()),  # tokens of a prompt
            ("ms", pa.list_(pa.float64())),  # milliseconds in every round
        ]
    ),
    ("checkpoint", "phase", "tokens"),
    ThroughputFacts,
    {"tokens": _COUNT, "made": _COUNT, "prompt": _COUNT, "ms": (1e-6, 1e9)},
    {"phase": ("decode", "prefill")},
    least_rows=0,  # of models that do not fit in the GPU's memory
)

PROFILE = TableKind(  # written by profile, one table per GPU
    "profile",
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
    ProfileFacts,
    {"tile_tokens": _COUNT, "tile_us": _QUANTITY, "kstep_us": _QUANTITY, "spread": _QUANTITY},
    schemes=("scheme",),
)


def write_table(
    kind: TableKind, path: str | PathLike[str], columns: dict[str, list[Any]], facts: dict[str, Any]
) -> None:
    """Write ``columns`` sorted by the kind's keys, with ``facts`` in the metadata, atomically."""
    table = pa.table(columns, schema=kind.schema_of(columns)).sort_by([(key, "ascending") for key in kind.keys])
    header = {"kind": kind.name, "version": kind.version, "facts": facts, "sha256": _checksum(table, facts)}
    table = table.replace_schema_metadata({_METADATA_KEY: canonical_json(header).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_statistics=False, store_schema=True)


def read_table(kind: TableKind, path: str | PathLike[str]) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table and its facts.

    `UserError` when it is missing, damaged, of another kind or version, or holds what it must not: the message names
    the column and the row.
    """
    fix = f"run the {kind.step} step again"
    if not Path(path).is_file():
        raise UserError(f"{path}: no such {kind.name} table; run the step that writes it")
    try:
        table = pq.read_table(path)
        table.validate(full=True)
        metadata = (table.schema.metadata or {})[_METADATA_KEY]
    except KeyError:
        raise UserError(f"{path}: not written by this tool; expected a {kind.name} table") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}); {fix}") from None
    header = parse_record(path, _Header, fix, metadata)
    found = (header["kind"], header["version"])
    if found != (kind.name, kind.version):
        raise UserError(
            f"{path}: is a {found[0]} table of version {found[1]}; expected {kind.name} version {kind.version}"
        )
    if not table.schema.equals(kind.schema_of(table.column_names), check_metadata=False):
        raise UserError(f"{path}: columns differ from those of a {kind.name} table of version {kind.version}; {fix}")
    facts = parse_record(path, kind.facts, fix, canonical_json(header["facts"]))
    if table.num_rows < kind.least_rows:
        raise UserError(f"{path}: holds no rows; {fix}")
    for name in table.column_names:
        _check_column(kind, path, table, name)
    if table.group_by(list(kind.keys)).aggregate([]).num_rows < table.num_rows:
        raise UserError(f"{path}: two rows have the same {', '.join(kind.keys)}; {fix}")
    if header.get("sha256") not in (None, _checksum(table, header["facts"])):
        raise UserError(f"{path}: damaged, its checksum does not fit; {fix}")
    return table, facts


def _check_column(kind: TableKind, path: Any, table: pa.Table, name: str) -> None:
    """`UserError` for the first value that is null, NaN, outside the kind's limits or none of its choices."""
    column = table.column(name)
    good = pc.is_valid(column)
    if not pc.all(good, min_count=0).as_py():
        _refuse(kind, path, table, name, pc.index(good, False).as_py())
    values, rows = column, None
    if pa.types.is_list(column.type):
        values, rows = pc.list_flatten(column), pc.list_parent_indices(column)
    good = pc.is_valid(values)
    if (limits := kind.limits.get(name) or (None if name in kind.schema.names else _QUANTITY)) is not None:
        least, most = limits
        good = pc.fill_null(pc.and_(pc.greater_equal(values, least), pc.less_equal(values, most)), False)
    elif name in kind.choices or name in kind.schemes:
        choices = kind.choices.get(name) or [text for text in pc.unique(values).to_pylist() if is_canonical(text)]
        good = pc.is_in(values, pa.array(choices, pa.string()))
    if not pc.all(good, min_count=0).as_py():
        bad = pc.index(good, False).as_py()
        _refuse(kind, path, table, name, bad if rows is None else rows[bad].as_py())


def _refuse(kind: TableKind, path: Any, table: pa.Table, name: str, row: int) -> None:
    """`UserError` that names a row by its keys."""
    keys = " ".join(f"{key} {table.column(key)[row].as_py()}" for key in kind.keys)
    value = table.column(name)[row].as_py()
    expected = "is not one that it can be"
    if name in kind.limits or name not in kind.schema.names:
        expected = "is not from {:g} to {:g}".format(*kind.limits.get(name, _QUANTITY))
    raise UserError(f"{path}: {name} of {keys} is {value!r}, which {expected}; run the {kind.step} step again")


def _checksum(table: pa.Table, facts: dict[str, Any]) -> str:
    """SHA-256 of facts and rows, whatever their encoding in the file."""
    digest = hashlib.sha256(canonical_json(facts).encode())
    for column in table.columns:
        plain = pa.types.is_primitive(column.type)
        digest.update(column.to_numpy() if plain else canonical_json(column.to_pylist()).encode())
    return digest.hexdigest()
