"""What an extrapolation says in words: when a mixture wins at the size of a larger model, and when it does not."""

from collections.abc import Mapping
from typing import Any

HEADS = (
    "tokens", "bits at most", "best uniform scheme", "its µs", "its loss", "our µs", "our loss",
    "time ratio", "loss ratio", "the mixture", "beaten, at more bits, by",
)  # fmt: skip
_EVEN = 1.01  # times or losses within this factor are even


def verdicts(content: Mapping[str, Any]) -> list[list[str]]:
    """Rows for `HEADS`: under every budget the picked mixture beside the uniform scheme of least loss within it."""
    return [_row(case, frontier) for case in content["cases"] for frontier in case["frontiers"]]


def _row(case: Mapping[str, Any], frontier: Mapping[str, Any]) -> list[str]:
    budget, ours = frontier["budget_bits"], frontier["vertices"][frontier["picked"]]
    start = [str(case["tokens"]), f"{budget:g}"]
    within = [one for one in case["uniform"] if one["bits"] <= budget]
    beyond = [one for one in case["uniform"] if one["bits"] > budget and _beats(one, ours)]
    beaten = ", ".join(f"{short(one['scheme'])} ({one['bits']:.2f} bits)" for one in beyond)
    mixture = [f"{ours['time_us']:.0f}", f"{ours['loss']:.4f}"]
    if not within:
        return [*start, "none", "", "", *mixture, "", "", "is all there is", beaten]
    best = min(within, key=lambda one: (one["loss"], one["time_us"]))
    time, loss = ours["time_us"] / best["time_us"], ours["loss"] / best["loss"] if best["loss"] else 1.0
    uniform = [short(best["scheme"]), f"{best['time_us']:.0f}", f"{best['loss']:.4f}"]
    return [*start, *uniform, *mixture, f"{time:.2f}", f"{loss:.2f}", _verdict(time, loss), beaten]


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(one["time_us"] <= other["time_us"] and one["loss"] <= other["loss"])


def _verdict(time: float, loss: float) -> str:
    slower, faster, worse, better = time > _EVEN, time < 1 / _EVEN, loss > _EVEN, loss < 1 / _EVEN
    if (better and not slower) or (faster and not worse):
        return "wins"
    if better and slower:
        return "loses less, in more time"
    if faster and worse:
        return "takes less time, loses more"
    return "does not win" if slower or worse else "is even"


def lines(content: Mapping[str, Any]) -> list[str]:
    """A sentence for every number of tokens: under which budgets the mixture wins, and what beats it."""
    found = []
    for case in content["cases"]:
        parts = []
        for _, budget, uniform, *_, time, loss, verdict, beaten in (_row(case, one) for one in case["frontiers"]):
            beside = f" ({time} of the time of {uniform}, {loss} of its loss)" if time else ""
            but = f", but {beaten} would beat it" if beaten else ""
            parts.append(f"at {budget} bits the mixture {verdict}{beside}{but}")
        found.append(f"On layers of {content['shape']}, {case['tokens']} tokens in a step: {'; '.join(parts)}.")
    return found


def short(name: str) -> str:
    """``w4a8_fp8`` of a scheme's canonical name."""
    return name.split("_")[0] + ("_fp8" if name.endswith("_fp8") else "")
