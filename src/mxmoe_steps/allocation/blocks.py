"""The linear blocks of a model and what each scheme does to them: losses and weight bits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import BLOCKS, ORIGINAL, SHARED, Scheme, parse_scheme
from mxmoe_steps.tables import LOSSES, NOT_LOSSES, read_table


@dataclass(frozen=True)
class Blocks:
    """The B allocated linear blocks, sorted by layer, expert (shared first) and gate, up, down. All int64 [B]."""

    layer: NDArray[np.int64]
    expert: NDArray[np.int64]
    kind: NDArray[np.int64]  # index into schemes.BLOCKS
    out_features: NDArray[np.int64]
    in_features: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.layer)

    def __getitem__(self, index: NDArray[Any]) -> "Blocks":
        """Some of the blocks."""
        return Blocks(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @property
    def params(self) -> NDArray[np.int64]:
        """Weights per block."""
        return self.out_features * self.in_features

    @property
    def launch(self) -> NDArray[np.int64]:
        """0: the block is multiplied in the gate+up launch of its layer, 1: in the down launch."""
        return (self.kind == BLOCKS.index("down")).astype(np.int64)

    def name(self, index: int) -> str:
        """For messages, e.g. ``layer 3 expert 17 up``."""
        expert = "shared expert" if self.expert[index] == SHARED else f"expert {self.expert[index]}"
        return f"layer {self.layer[index]} {expert} {BLOCKS[self.kind[index]]}"


@dataclass(frozen=True)
class Losses:
    """Loss and weight bits of every block under every scheme: float64 and int64 [B, S].

    ``by_domain`` [D, B, S]: the parts of the loss, one per domain of the calibration text, which add up to it.
    ``tokens`` int64 [B]: calibration tokens that the block's expert saw.
    """

    blocks: Blocks
    schemes: tuple[Scheme, ...]
    loss: NDArray[np.float64]
    bits: NDArray[np.int64]
    quantizer: str
    domains: tuple[str, ...]
    by_domain: NDArray[np.float64]
    tokens: NDArray[np.int64]
    model: str = ""  # fingerprint, empty if made up


def read_losses(paths: Sequence[str | Path], metric: str, original: bool) -> Losses:
    """Read one LOSSES table per scheme; ``original`` adds w16a16, whose loss is zero and needs no table.

    `UserError`: tables of different quantizers, models or texts, a scheme twice, a missing block, no losses of that
    metric, bits that are not the scheme's.
    """
    tables = {}
    quantizers: dict[str | Path, str] = {}
    models: dict[str | Path, str] = {}
    texts: dict[str | Path, dict[str, int]] = {}
    for path in paths:
        table, facts = read_table(LOSSES, path)
        scheme = parse_scheme(facts["scheme"])
        if scheme in tables:
            raise UserError(f"{path}: a second table of losses for {scheme}; give one table per scheme")
        if metric == "fisher" and not facts["fisher"]:
            raise UserError(
                f"{path}: has no fisher losses: nothing was captured of the gradient; set calibrate.gradient: true, or"
                " solve.metric: out_sq"
            )
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        if metric not in columns.keys() - NOT_LOSSES:
            others = sorted(name for name in columns.keys() - NOT_LOSSES if "." not in name)
            raise UserError(f"{path}: has no losses {metric!r}, but {', '.join(others)}; calibrate with it")
        _check_bits(columns, scheme, path)
        kind = np.array([BLOCKS.index(block) for block in columns["block"]], np.int64)
        order = np.lexsort((kind, columns["expert"], columns["layer"]))
        tables[scheme] = {**columns, "kind": kind, "order": order, "path": path}
        quantizers[path] = facts["quantizer"]
        models[path], texts[path] = facts["model"], facts["domains"]
        if missing := [name for name in facts["domains"] if f"{metric}.{name}" not in columns]:
            raise UserError(f"{path}: has no column {metric}.{missing[0]}; run the calibrate step again")
    if len(set(quantizers.values())) > 1:
        raise UserError(
            f"losses of different quantizers do not compare: {', '.join(f'{p} is {q}' for p, q in quantizers.items())}"
        )
    for path, model in models.items():
        if model != models[paths[0]]:
            raise UserError(f"{path} and {paths[0]} are of different models; calibrate every scheme on the same model")
        if texts[path] != texts[paths[0]]:
            raise UserError(f"{path} and {paths[0]} are of different texts; calibrate every scheme on the same text")
    first = next(iter(tables.values()))
    blocks = Blocks(
        *(
            first[name][first["order"]].astype(np.int64)
            for name in ("layer", "expert", "kind", "out_features", "in_features")
        )
    )
    _check_whole_experts(blocks, first["path"])
    schemes = tuple(sorted({*tables, ORIGINAL} if original else tables))
    domains = tuple(sorted(texts[paths[0]]))
    loss = np.zeros((len(blocks), len(schemes)))
    by_domain = np.zeros((len(domains), *loss.shape))
    bits = np.repeat(blocks.params[:, None] * ORIGINAL.weight_bits, len(schemes), 1)
    for column, scheme in enumerate(schemes):
        if scheme not in tables:
            continue
        table = tables[scheme]
        _check_same_blocks(blocks, table, first["path"])
        loss[:, column] = table[metric][table["order"]]
        by_domain[:, :, column] = [table[f"{metric}.{domain}"][table["order"]] for domain in domains]
        bits[:, column] = np.rint(table["bits"][table["order"]] * blocks.params)
    tokens = first["tokens"][first["order"]].astype(np.int64)
    return Losses(blocks, schemes, loss, bits, quantizers[paths[0]], domains, by_domain, tokens, models[paths[0]])


def with_least_tokens(losses: Losses, least: float) -> Losses:
    """Losses as if no routed expert had seen fewer tokens than ``least`` times the mean of those of its layer.

    What few tokens say of an expert is scaled up: text that calibration has not seen may well use it.
    """
    blocks, factor = losses.blocks, np.ones(len(losses.blocks))
    for layer in np.unique(blocks.layer):
        of = (blocks.layer == layer) & (blocks.expert != SHARED)
        factor[of] = np.maximum(1.0, least * losses.tokens[of].mean() / np.maximum(losses.tokens[of], 1))
    return replace(losses, loss=losses.loss * factor[:, None], by_domain=losses.by_domain * factor[:, None])


def _check_bits(columns: dict[str, NDArray[Any]], scheme: Scheme, path: str | Path) -> None:
    """Raise unless the bits of every block are those of its scheme."""
    widths, place = np.unique(columns["in_features"], return_inverse=True)
    expected = np.array([scheme.bits(int(width)) for width in widths])[place]
    bad = np.flatnonzero(columns["bits"] != expected)
    if len(bad):
        layer, expert, block, bits = (columns[name][bad[0]] for name in ("layer", "expert", "block", "bits"))
        raise UserError(
            f"{path}: bits of layer {layer} expert {expert} {block} is {bits}, under {scheme} it is {expected[bad[0]]};"
            " run the calibrate step again"
        )


def _check_whole_experts(blocks: Blocks, path: str | Path) -> None:
    """Raise unless every expert has gate, up and down."""
    for layer, expert in sorted(set(zip(blocks.layer.tolist(), blocks.expert.tolist(), strict=True))):
        kinds = blocks.kind[(blocks.layer == layer) & (blocks.expert == expert)].tolist()
        if kinds != list(range(len(BLOCKS))):
            found = ", ".join(BLOCKS[kind] for kind in kinds)
            raise UserError(f"{path}: layer {layer} expert {expert} has losses for {found}; calibrate it again")


def _check_same_blocks(blocks: Blocks, table: dict[str, Any], path: str | Path) -> None:
    """Raise unless ``table`` holds exactly the blocks of the first table."""
    keys = np.stack([blocks.layer, blocks.expert, blocks.kind, blocks.out_features, blocks.in_features], 1)
    names = ("layer", "expert", "kind", "out_features", "in_features")
    found = np.stack([table[name][table["order"]] for name in names], 1)
    if keys.shape == found.shape and (keys == found).all():
        return
    rows, others = {tuple(row) for row in keys.tolist()}, {tuple(row) for row in found.tolist()}
    layer, expert, kind, *_ = sorted(rows ^ others)[0]
    raise UserError(
        f"{table['path']} and {path} do not describe the same blocks: they differ at layer {layer} expert {expert} "
        f"{BLOCKS[kind]}; calibrate every scheme on the same model"
    )


def budget_in_bits(budget_bits: str, params: int) -> int:
    """Total weight bits that an average of ``budget_bits`` allows, exact: 2.25 admits 2.25."""
    return int(Fraction(budget_bits) * params)
