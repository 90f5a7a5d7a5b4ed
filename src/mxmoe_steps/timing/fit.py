"""Fit the time model of `allocation.time_model` to measured launches. Pure functions on numpy arrays.

Tiles first: the launches of single tiles at full occupancy give every tile's fixed and per-k-step time. Then the
constants, on whole problems: for a given ``loop_tile_us`` the model is the maximum of two linear functions, so least
squares and the side that each problem is on take turns (Magnani and Boyd, 2009). Errors are relative, and large ones
count linearly.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.time_model import (
    CONSTANTS,
    KSTEP,
    block_work,
    by_warp,
    bytes_moved,
    tile_counts,
)
from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architectures import PHASE_ROWS, PHASES
from mxmoe_steps.schemes import parse_scheme
from mxmoe_steps.timing.launches import MODELS

Rows = list[dict[str, Any]]  # of a MEASUREMENTS table
Tiles = dict[tuple[str, str], NDArray[np.float64]]  # (phase, scheme) -> tile_tokens, tile_us, kstep_us, spread [C, 4]

LEAST_PROBLEMS = 20
LINEAR = 0.02  # relative errors beyond it count linearly
LAUNCH_GRID = np.arange(0.0, 20.1, 0.25)  # microseconds
LOOP_GRID = np.arange(0.0, 0.301, 0.01)  # microseconds
SIDES = (0.25, 0.35, 0.45)  # microseconds per MB at which the two sides are taken to be equal at first
PASSES = 60
FOLDS = 5  # held-out problems are predicted by a fit to the other folds


def median_us(row: dict[str, Any]) -> float:
    """Median over the rounds."""
    return float(np.median(row["us"]))


def spread(row: dict[str, Any]) -> float:
    """(most - least) / median over the rounds."""
    return float(np.ptp(row["us"]) / np.median(row["us"]))


def fit_tiles(rows: Iterable[dict[str, Any]], sms: int) -> Tiles:
    """Tile times from launches of kind ``tile``: launch + waves x (tile_us + kstep_us x K / 128).

    The launches' own constant is shared by all of them and found on a grid.
    """
    groups: dict[tuple[str, str, int], Rows] = {}
    for row in rows:
        groups.setdefault((row["phase"], row["schemes"][0], row["tokens"]), []).append(row)
    cells = []
    for (phase, scheme, tokens), mine in sorted(groups.items()):
        us = np.array([median_us(row) for row in mine])
        height = PHASE_ROWS[phase]
        waves = np.array([len(row["rows"]) * -(-row["out_features"] // height) / sms for row in mine])
        ksteps = np.array([row["in_features"] / KSTEP for row in mine])
        matrix = np.stack([waves, waves * ksteps], 1) / us[:, None]
        cells.append(((phase, scheme, tokens), us, matrix, float(np.median([spread(row) for row in mine]))))

    def solve(launch: float) -> tuple[float, list[NDArray[np.float64]]]:
        found, error = [], 0.0
        for _, us, matrix, _ in cells:
            wanted = 1 - launch / us
            times = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
            if times[0] < 0:
                times = np.array([0.0, matrix[:, 1] @ wanted / (matrix[:, 1] @ matrix[:, 1])])
            found.append(times)
            error += float(((matrix @ times - wanted) ** 2).sum())
        return error, found

    _, best = min((solve(float(launch)) for launch in LAUNCH_GRID), key=lambda one: one[0])
    tiles: dict[tuple[str, str], list[list[float]]] = {}
    for ((phase, scheme, tokens), *_, wide), times in zip(cells, best, strict=True):
        tiles.setdefault((phase, scheme), []).append([tokens, *times.tolist(), wide])
    return {key: np.array(sorted(mine)) for key, mine in tiles.items()}


@dataclass(frozen=True)
class Features:
    """What the model needs of P launches, float64 [P]: work and its other-loop tiles per SM, the longest tile and its
    other loops, megabytes moved, main loops of the kernel, and the measured time."""

    work: NDArray[np.float64]
    foreign: NDArray[np.float64]  # tiles x other main loops / P
    longest: NDArray[np.float64]
    megabytes: NDArray[np.float64]
    loops: NDArray[np.float64]
    us: NDArray[np.float64]

    def __getitem__(self, index: Any) -> "Features":
        return Features(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def features(rows: Rows, tiles: Tiles, sms: int) -> Features:
    """Features of fused launches."""
    found = []
    for row in rows:
        n, k, phase = np.array([row["out_features"]]), np.array([row["in_features"]]), row["phase"]
        counts, names = np.array(row["rows"], np.int64), np.array(row["schemes"])
        loops = sum(len(tiles[phase, name]) for name in row["carried"])
        work = foreign = longest = moved = 0.0
        for name in sorted(set(row["schemes"])):
            mine = counts[names == name][None]
            cells, scheme = tiles[phase, name][:, :3], parse_scheme(name)
            busy, long = block_work(mine, n, k, cells, 0.0, PHASE_ROWS[phase])
            tile_count = tile_counts(mine, cells[:, 0]).sum() * -(-row["out_features"] // PHASE_ROWS[phase])
            weight_bytes, row_bytes = bytes_moved(mine, n, k, scheme)
            work += float(busy.sum())
            foreign += float(tile_count) * (loops - len(cells))
            longest = max(longest, float(long.max()))
            moved += float((mine > 0).sum() * weight_bytes[0] + mine.sum() * row_bytes[0])
        found.append((work / sms, foreign / sms, longest, moved / 1e6, loops, median_us(row)))
    return Features(*np.array(found, np.float64).reshape(-1, 6).T)


def predict(data: Features, constants: dict[str, float]) -> NDArray[np.float64]:
    """Microseconds [P]."""
    work = data.work + constants["loop_tile_us"] * data.foreign
    memory = data.megabytes * 1e3 / constants["bandwidth_gbs"] + constants["exposed"] * work
    side = np.maximum(work + constants["tail"] * data.longest, memory)
    return np.asarray(constants["launch_us"] + constants["loop_launch_us"] * data.loops + side)


def fit_constants(data: Features) -> dict[str, float]:
    """The constants of least error, see `time_model.CONSTANTS`."""
    best = (np.inf, np.zeros(5), 0.0)
    for loop_tile_us in LOOP_GRID:
        work = data.work + loop_tile_us * data.foreign
        for equal in SIDES:
            error, found = _alternate(data, work, work >= equal * data.megabytes)
            if error < best[0]:
                best = (error, found, float(loop_tile_us))
    _, (launch, loop, tail, per_megabyte, exposed), loop_tile_us = best
    if per_megabyte <= 0:
        raise UserError("the measurements show no launch that waits for memory: run measure again")
    values = (launch, loop, loop_tile_us, tail, exposed, 1e3 / per_megabyte)
    return dict(zip(CONSTANTS, map(float, values), strict=True))


def _alternate(
    data: Features, work: NDArray[np.float64], compute: NDArray[np.bool_]
) -> tuple[float, NDArray[np.float64]]:
    """Least error over launch, launch per loop, tail, microseconds per MB and exposed, from the given sides."""
    best = (np.inf, np.zeros(5))
    for _ in range(PASSES):
        zero = np.zeros_like(work)
        columns = [
            np.ones_like(work), data.loops, np.where(compute, data.longest, zero),
            np.where(compute, zero, data.megabytes), np.where(compute, zero, work),
        ]  # fmt: skip
        found = _not_negative(np.stack(columns, 1) / data.us[:, None], 1 - np.where(compute, work, zero) / data.us)
        one, two = work + found[2] * data.longest, found[3] * data.megabytes + found[4] * work
        modelled = found[0] + found[1] * data.loops + np.maximum(one, two)
        error = float(np.abs(modelled / data.us - 1).sum())
        if error < best[0] and found[3] > 0:
            best = (error, found)
        if ((one >= two) == compute).all():
            break
        compute = one >= two
    return best


def _not_negative(matrix: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative x of least error of ``matrix @ x``, by reweighted least squares; dropped at zero once negative."""
    weight = np.ones(len(wanted))
    found = np.zeros(matrix.shape[1])
    for _ in range(6):
        active = np.arange(matrix.shape[1])
        while len(active):
            found[:] = 0
            found[active] = np.linalg.lstsq((matrix * weight[:, None])[:, active], wanted * weight, rcond=None)[0]
            if (found >= 0).all():
                break
            active = active[found[active] >= 0]
        weight = 1 / np.sqrt(np.maximum(np.abs(matrix @ found - wanted), LINEAR))
    return found


def held_out(data: Features) -> NDArray[np.float64]:
    """Predictions [P] of every fifth problem by constants fitted to the others, five times."""
    fold = np.arange(len(data.us)) % FOLDS
    result = np.zeros(len(fold))
    for here in (fold == number for number in range(FOLDS)):
        result[here] = predict(data[here], fit_constants(data[~here]))
    return result


def errors(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> dict[str, float]:
    """Number of problems, median and 95th percentile of |predicted / measured - 1|."""
    error = np.abs(predicted / measured - 1)
    return {"problems": len(error), "median": float(np.median(error)), "p95": float(np.quantile(error, 0.95))}


def _problem(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows of the same problem share."""
    return (row["model"], row["block"], row["tokens"], tuple(row["rows"]), tuple(row["schemes"]), tuple(row["carried"]))


def _ratios(pairs: Iterable[tuple[int, float]]) -> list[dict[str, float]]:
    """Median, least and most of (tokens, ratio) pairs in three ranges of tokens."""
    found, listed = [], list(pairs)
    for low, high in ((1, 15), (16, 1023), (1024, 1 << 30)):
        mine = [ratio for tokens, ratio in listed if low <= tokens <= high]
        if mine:
            found.append({"tokens_from": low, "launches": len(mine), "median": float(np.median(mine)),
                          "least": min(mine), "most": max(mine)})  # fmt: skip
    return found


def fit(rows: Rows, sms: int) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Columns and fitted facts of a PROFILE table from the rows of a MEASUREMENTS table.

    Held-out errors are those of the kernel that `Architecture.phase_for` picks. `UserError` if too little was measured.
    """
    tiles = fit_tiles([row for row in rows if row["kind"] == "tile"], sms)
    fused = [row for row in rows if row["kind"] == "problem" and not row["apart"]]
    shapes = {one.model: one for one in MODELS}
    chosen = []
    for row in fused:
        alone = by_warp(map(parse_scheme, row["carried"]))
        if row["phase"] == shapes[row["model"]].phase(row["block"], row["tokens"], sms, alone):
            chosen.append(row)
    missing = sorted({(phase, name) for row in fused for name in row["carried"] for phase in PHASES} - set(tiles))
    if missing or len(chosen) < LEAST_PROBLEMS:
        what = f"{len(chosen)} problems, fewer than {LEAST_PROBLEMS}"
        if missing:
            phase, scheme = missing[0]
            what = f"no {phase} tiles of {scheme}"
        raise UserError(f"the measurements hold {what}: run measure again")
    data = features(chosen, tiles, sms)
    mixed = np.array([len(set(row["schemes"])) > 1 for row in chosen])
    predicted = held_out(data)
    wide = np.array([spread(row) for row in chosen])
    measured = {(_problem(row), row["phase"], row["apart"]): median_us(row) for row in rows if row["kind"] == "problem"}
    if not all((_problem(row), phase, False) in measured for row in chosen for phase in PHASES):
        raise UserError("the measurements hold a problem without one of its phases: run measure again")
    apart = [(row["tokens"], median_us(row) / measured[_problem(row), row["phase"], True]) for row in chosen
             if (_problem(row), row["phase"], True) in measured]  # fmt: skip
    lost = [median_us(row) / min(measured[_problem(row), phase, False] for phase in PHASES) - 1
            for row in chosen]  # fmt: skip
    cells = [(phase, scheme, *cell) for (phase, scheme), mine in sorted(tiles.items()) for cell in mine.tolist()]
    columns = dict(
        zip(("phase", "scheme", "tile_tokens", "tile_us", "kstep_us", "spread"), zip(*cells, strict=True), strict=True)
    )
    return {name: [int(v) if name == "tile_tokens" else v for v in values] for name, values in columns.items()}, {
        **fit_constants(data),
        "errors": {
            kind: errors(predicted[of], data.us[of]) for kind, of in (("single", ~mixed), ("mixed", mixed)) if of.any()
        },
        "fused_over_apart": _ratios(apart),
        "held_out": {"measured_us": data.us.tolist(), "predicted_us": predicted.tolist(), "mixed": mixed.tolist()},
        "phase_loss": {"median": float(np.median(lost)), "p95": float(np.quantile(lost, 0.95))},
        "repeat_spread": {"median": float(np.median(wide)), "p95": float(np.quantile(wide, 0.95))},
    }
