"""Fit the time model to measured launches: tile times first, then the constants, then what the fit is worth."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.architectures import PHASES
from mxmoe_steps.schemes import parse_scheme
from mxmoe_steps.timing.fit_constants import features, fit_constants, held_out
from mxmoe_steps.timing.fit_tiles import fit_tiles
from mxmoe_steps.timing.measurements import Measurement, median_us, problem_of, spread
from mxmoe_steps.timing.shapes import MODELS

LEAST_PROBLEMS = 20
TOKEN_RANGES = ((1, 15), (16, 1023), (1024, 1 << 30))


def errors(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> dict[str, float]:
    """Number of problems, median and 95th percentile of |predicted / measured - 1|."""
    return {"problems": len(measured), **_median_p95(np.abs(predicted / measured - 1))}


def fit(
    measurements: list[Measurement], sms: int, architecture: Architecture
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Columns and fitted facts of a PROFILE table.

    Held-out errors are those of the kernel that `Architecture.phase_for` picks. `UserError` if too little was measured.
    """
    tiles = fit_tiles([one for one in measurements if one["kind"] == "tile"], sms)
    problems = [one for one in measurements if one["kind"] == "problem"]
    fused = [one for one in problems if not one["apart"]]
    picked = [one for one in fused if one["phase"] == _phase(one, sms, architecture)]
    missing = sorted({(phase, name) for one in fused for name in one["carried"] for phase in PHASES} - set(tiles))
    if missing or len(picked) < LEAST_PROBLEMS:
        what = f"{len(picked)} problems, fewer than {LEAST_PROBLEMS}"
        if missing:
            phase, scheme = missing[0]
            what = f"no {phase} tiles of {scheme}"
        raise UserError(f"the measurements hold {what}: run measure again")
    data = features(picked, tiles, sms)
    mixed = np.array([len(set(one["schemes"])) > 1 for one in picked])
    predicted = held_out(data)
    measured = {(problem_of(one), one["phase"], one["apart"]): median_us(one) for one in problems}
    if not all((problem_of(one), phase, False) in measured for one in picked for phase in PHASES):
        raise UserError("the measurements hold a problem without one of its phases: run measure again")
    apart = [(one["tokens"], median_us(one) / measured[problem_of(one), one["phase"], True]) for one in picked
             if (problem_of(one), one["phase"], True) in measured]  # fmt: skip
    lost = [median_us(one) / min(measured[problem_of(one), phase, False] for phase in PHASES) - 1
            for one in picked]  # fmt: skip
    cells = [(phase, scheme, int(tokens), *times) for (phase, scheme), own in sorted(tiles.items())
             for tokens, *times in own.tolist()]  # fmt: skip
    names = ("phase", "scheme", "tile_tokens", "tile_us", "kstep_us", "spread")
    columns = {name: list(values) for name, values in zip(names, zip(*cells, strict=True), strict=True)}
    return columns, {
        **fit_constants(data),
        "errors": {
            kind: errors(predicted[of], data.us[of]) for kind, of in (("single", ~mixed), ("mixed", mixed)) if of.any()
        },
        "fused_over_apart": _ratios(apart),
        "held_out": {"measured_us": data.us.tolist(), "predicted_us": predicted.tolist(), "mixed": mixed.tolist()},
        "phase_loss": _median_p95(lost),
        "repeat_spread": _median_p95([spread(one) for one in picked]),
    }


def _phase(one: Measurement, sms: int, architecture: Architecture) -> str:
    """Phase of the kernel that a layer runs for this problem."""
    layer = next(layer for layer in MODELS if layer.model == one["model"])
    rows = one["tokens"] * layer.top_k
    return layer.launch(one["block"]).phase(rows, sms, map(parse_scheme, one["carried"]), architecture)


def _median_p95(values: Any) -> dict[str, float]:
    return {"median": float(np.median(values)), "p95": float(np.quantile(values, 0.95))}


def _ratios(pairs: Iterable[tuple[int, float]]) -> list[dict[str, float]]:
    """Median, least and most of (tokens, ratio) pairs in the ranges of tokens that have some."""
    summary, listed = [], list(pairs)
    for low, high in TOKEN_RANGES:
        ratios = [ratio for tokens, ratio in listed if low <= tokens <= high]
        if ratios:
            summary.append({"tokens_from": low, "launches": len(ratios), "median": float(np.median(ratios)),
                            "least": min(ratios), "most": max(ratios)})  # fmt: skip
    return summary
