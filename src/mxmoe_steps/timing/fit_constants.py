"""The constants of the time model from launches of whole problems.

For a given ``loop_tile_us`` the model is the maximum of two linear functions, so least squares and the side that each
problem is on take turns (Magnani and Boyd, 2009). Errors are relative, and large ones count linearly (Huber, 1964).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architectures import PHASE_ROWS
from mxmoe_steps.schemes import parse_scheme
from mxmoe_steps.timing.fit_tiles import Tiles
from mxmoe_steps.timing.measurements import Measurement, median_us
from mxmoe_steps.timing.model import CONSTANTS, block_work, bytes_moved, tile_counts

LINEAR = 0.02  # relative errors beyond it count linearly
LOOP_GRID = np.arange(0.0, 0.301, 0.01)  # microseconds
SIDES = (0.25, 0.35, 0.45)  # microseconds per MB at which the two sides are taken to be equal at first
PASSES = 60
FOLDS = 5  # held-out problems are predicted by a fit to the other folds


@dataclass(frozen=True)
class Features:
    """What the model needs of L launches, float64 [L]: work and its other-loop tiles per SM, the longest tile,
    megabytes moved and those of activations among them, main loops of the kernel, and the measured time."""

    work: NDArray[np.float64]
    foreign: NDArray[np.float64]  # tiles x other main loops / multiprocessors
    longest: NDArray[np.float64]
    megabytes: NDArray[np.float64]
    activations: NDArray[np.float64]
    loops: NDArray[np.float64]
    us: NDArray[np.float64]

    def __getitem__(self, index: Any) -> "Features":
        return Features(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def features(measurements: list[Measurement], tiles: Tiles, sms: int) -> Features:
    """Features of fused launches."""
    return Features(*np.array([_features(one, tiles, sms) for one in measurements], np.float64).reshape(-1, 7).T)


def _features(one: Measurement, tiles: Tiles, sms: int) -> tuple[float, ...]:
    n, k, phase = np.array([one["out_features"]]), np.array([one["in_features"]]), one["phase"]
    rows, names = np.array(one["rows"], np.int64), np.array(one["schemes"])
    loops = sum(len(tiles[phase, name]) for name in one["carried"])
    work = foreign = longest = weights = activations = 0.0
    for name in sorted(set(one["schemes"])):
        own = rows[names == name][None]
        cells, scheme = tiles[phase, name][:, :3], parse_scheme(name)
        busy, long = block_work(own, n, k, cells, 0.0, PHASE_ROWS[phase])
        tile_count = tile_counts(own, cells[:, 0]).sum() * -(-one["out_features"] // PHASE_ROWS[phase])
        weight_bytes, token_bytes = bytes_moved(n, k, scheme)
        work += float(busy.sum())
        foreign += float(tile_count) * (loops - len(cells))
        longest = max(longest, float(long.max()))
        weights += float((own > 0).sum() * weight_bytes[0])
        activations += float(own.sum() * token_bytes[0])
    megabytes = (weights + activations) / 1e6
    return work / sms, foreign / sms, longest, megabytes, activations / 1e6, loops, median_us(one)


def predict(data: Features, constants: dict[str, float]) -> NDArray[np.float64]:
    """Microseconds [L] by the formula of `timing.model`."""
    work = data.work + constants["loop_tile_us"] * data.foreign
    memory = (data.megabytes - data.activations) * 1e3 / constants["bandwidth_gbs"]
    memory = memory + data.activations * 1e3 / constants["activation_gbs"] + constants["exposed"] * work
    side = np.maximum(work + constants["tail"] * data.longest, memory)
    return np.asarray(constants["launch_us"] + constants["loop_launch_us"] * data.loops + side)


def fit_constants(data: Features) -> dict[str, float]:
    """The constants of least error, see `timing.model.CONSTANTS`; `UserError` if no launch waits for memory."""
    best = (np.inf, np.zeros(6), 0.0)
    for loop_tile_us in LOOP_GRID:
        work = data.work + loop_tile_us * data.foreign
        for equal in SIDES:
            error, solution = _alternate(data, work, work >= equal * data.megabytes)
            if error < best[0]:
                best = (error, solution, float(loop_tile_us))
    _, (launch, loop, tail, per_megabyte, more, exposed), loop_tile_us = best
    if per_megabyte <= 0:
        raise UserError("the measurements show no launch that waits for memory: run measure again")
    values = (launch, loop, loop_tile_us, tail, exposed, 1e3 / per_megabyte, 1e3 / (per_megabyte + more))
    return dict(zip(CONSTANTS, map(float, values), strict=True))


def _alternate(
    data: Features, work: NDArray[np.float64], compute: NDArray[np.bool_]
) -> tuple[float, NDArray[np.float64]]:
    """Least error over launch, launch per loop, tail, microseconds per MB, what more one of activations takes, and
    exposed, from the given sides."""
    best = (np.inf, np.zeros(6))
    for _ in range(PASSES):
        zero = np.zeros_like(work)
        columns = [
            np.ones_like(work), data.loops, np.where(compute, data.longest, zero),
            np.where(compute, zero, data.megabytes), np.where(compute, zero, data.activations),
            np.where(compute, zero, work),
        ]  # fmt: skip
        solution = _not_negative(np.stack(columns, 1) / data.us[:, None], 1 - np.where(compute, work, zero) / data.us)
        busy = work + solution[2] * data.longest
        moving = solution[3] * data.megabytes + solution[4] * data.activations + solution[5] * work
        modelled = solution[0] + solution[1] * data.loops + np.maximum(busy, moving)
        error = float(np.abs(modelled / data.us - 1).sum())
        if error < best[0] and solution[3] > 0:
            best = (error, solution)
        if ((busy >= moving) == compute).all():
            break
        compute = busy >= moving
    return best


def _not_negative(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative x of least error of ``matrix @ x``, by reweighted least squares; dropped at zero once negative."""
    weight = np.ones(len(target))
    solution = np.zeros(matrix.shape[1])
    for _ in range(6):
        active = np.arange(matrix.shape[1])
        while len(active):
            solution[:] = 0
            solution[active] = np.linalg.lstsq((matrix * weight[:, None])[:, active], target * weight, rcond=None)[0]
            if (solution >= 0).all():
                break
            active = active[solution[active] >= 0]
        weight = 1 / np.sqrt(np.maximum(np.abs(matrix @ solution - target), LINEAR))
    return solution


def held_out(data: Features) -> NDArray[np.float64]:
    """Predictions [L] of every fifth problem by constants fitted to the others, five times."""
    fold = np.arange(len(data.us)) % FOLDS
    result = np.zeros(len(fold))
    for here in (fold == number for number in range(FOLDS)):
        result[here] = predict(data[here], fit_constants(data[~here]))
    return result
