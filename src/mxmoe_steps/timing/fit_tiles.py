"""Tile times from launches of single tiles at full occupancy: linear least squares for every tile."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.kernels.architectures import PHASE_ROWS
from mxmoe_steps.timing.measurements import Measurement, median_us, spread
from mxmoe_steps.timing.model import KSTEP

Tiles = dict[tuple[str, str], NDArray[np.float64]]  # (phase, scheme) -> tile_tokens, tile_us, kstep_us, spread [C, 4]

LAUNCH_GRID = np.arange(0.0, 20.1, 0.25)  # microseconds


def fit_tiles(measurements: Iterable[Measurement], sms: int) -> Tiles:
    """Tile times from launches of kind ``tile``: us = launch + waves x (tile_us + kstep_us x K / 128).

    Waves: tiles over ``sms`` multiprocessors. Errors are relative. The launches' own constant is shared by all tiles
    and found on a grid.
    """
    by_tile: dict[tuple[str, str, int], list[Measurement]] = {}
    for one in measurements:
        by_tile.setdefault((one["phase"], one["schemes"][0], one["tokens"]), []).append(one)
    equations = {tile: _equations(launches, sms) for tile, launches in sorted(by_tile.items())}

    def solve(launch: float) -> tuple[float, list[NDArray[np.float64]]]:
        solutions: list[NDArray[np.float64]] = []
        error = 0.0
        for us, matrix in equations.values():
            target = 1 - launch / us
            times = np.asarray(np.linalg.lstsq(matrix, target, rcond=None)[0], np.float64)
            if times[0] < 0:
                times = np.array([0.0, matrix[:, 1] @ target / (matrix[:, 1] @ matrix[:, 1])])
            solutions.append(times)
            error += float(((matrix @ times - target) ** 2).sum())
        return error, solutions

    _, best = min((solve(float(launch)) for launch in LAUNCH_GRID), key=lambda one: one[0])
    tiles: dict[tuple[str, str], list[list[float]]] = {}
    for tile, times in zip(equations, best, strict=True):
        phase, scheme, tokens = tile
        typical = float(np.median([spread(one) for one in by_tile[tile]]))
        tiles.setdefault((phase, scheme), []).append([tokens, *times.tolist(), typical])
    return {key: np.array(sorted(cells)) for key, cells in tiles.items()}


def _equations(launches: list[Measurement], sms: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Microseconds [n] of a tile's launches, and waves and waves x k-steps over them [n, 2]."""
    us = np.array([median_us(one) for one in launches])
    height = PHASE_ROWS[launches[0]["phase"]]
    waves = np.array([len(one["rows"]) * -(-one["out_features"] // height) / sms for one in launches])
    ksteps = np.array([one["in_features"] / KSTEP for one in launches])
    return us, np.stack([waves, waves * ksteps], 1) / us[:, None]
