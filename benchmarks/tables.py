"""Fill the marked regions of README.md and docs from what benchmarks wrote and from the shipped measurements.

    python benchmarks/tables.py

A region is <!-- table: NAME -->...<!-- end -->: lines of their own for a table, a part of a line for figures in a
sentence. `TABLES` makes each from `docs/measurements/*.json`, the files that benchmarks write with --out, from
`mixed_allocations.json`, from the tables of model families, or from the time model fitted to the measurements in
`timing/profiles`. A test holds that no region is out of date.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from mxmoe_steps.kernels.sm90.architecture import HOPPER
from mxmoe_steps.models.__main__ import FAMILY_HEAD, family_rows, refused_rows
from mxmoe_steps.models.adapters import FAMILIES
from mxmoe_steps.timing.estimate import PEAK_SHARES, measured_file
from mxmoe_steps.timing.fit import fit
from mxmoe_steps.timing.measurements import read_measurements
from mxmoe_steps.timing.model import CONSTANTS

ROOT = Path(__file__).parents[1]
MEASUREMENTS = ROOT / "docs" / "measurements"
REGION = re.compile(r"<!-- table: (\S+) -->(\n?)(.*?)\n?<!-- end -->", re.DOTALL)
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; empty cells are one space wide."""
    lines = [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def digits(value: float) -> str:
    """Four digits, as the benchmarks print them."""
    return f"{value:.0f}" if value >= 999.95 else f"{value:.1f}"


MEASURED = ("h100", "h200")


@cache
def profile(hardware: str) -> dict[str, Any]:
    """Facts of the measurements of a GPU and of the fit to them."""
    path = measured_file(hardware)
    assert path is not None
    rows, facts = read_measurements(path)
    return facts | fit(rows, facts["sms"], HOPPER)[1]


def profile_machines() -> str:
    said = []
    for facts in map(profile, MEASURED):
        machine = f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, {facts['compiler']}"
        said.append(f"- {machine}, {facts['date']}, {facts['rounds']} rounds")
    return "\n".join(said)


def profile_errors() -> str:
    """Medians and 95th percentiles of errors; the launches are the same on every GPU."""
    rows = []
    for kind, name in (("single", "one scheme"), ("mixed", "mixed schemes")):
        found = [profile(hardware)["errors"][kind] for hardware in MEASURED]
        rows.append(
            (name, str(found[0]["problems"]), *(percent(one[key]) for one in found for key in ("median", "p95")))
        )
    spreads = [profile(hardware)["repeat_spread"] for hardware in MEASURED]
    launches = sum(int(count) for _, count, *_ in rows)
    spread = [percent(one[key]) for one in spreads for key in ("median", "p95")]
    rows.append(("repeats of one launch (spread)", str(launches), *spread))
    head = [f"{hardware.upper()}, {what}" for hardware in MEASURED for what in ("median error", "95th percentile")]
    return markdown(("held out", "launches", *head), rows)


def profile_summary() -> str:
    single, mixed = (profile("h100")["errors"][kind] for kind in ("single", "mixed"))
    alone = f"{percent(single['median'])} at the median and {percent(single['p95'])} at the 95th percentile"
    return f"{alone}, {100 * mixed['median']:.1f} and {percent(mixed['p95'])} for mixtures"


def profile_constants() -> str:
    rows = [(f"`{name}`", *(f"{profile(hardware)[name]:.4g}" for hardware in MEASURED)) for name in CONSTANTS]
    return markdown(("constant", *(hardware.upper() for hardware in MEASURED)), rows)


def profile_fused() -> str:
    """Medians and extremes of time fused over time apart, by tokens."""
    ratios = [profile(hardware)["fused_over_apart"] for hardware in MEASURED]
    ends = [str(one["tokens_from"] - 1) for one in ratios[0][1:]]
    names = [f"{one['tokens_from']} to {end} tokens" for one, end in zip(ratios[0], ends, strict=False)]
    names.append(f"{ratios[0][-1]['tokens_from']} tokens and more")
    rows = [
        (
            name,
            str(same[0]["launches"]),
            *(f"{one['median']:.2f} ({one['least']:.2f} to {one['most']:.2f})" for one in same),
        )
        for name, *same in zip(names, *ratios, strict=True)
    ]
    head = [f"{hardware.upper()}, median (least to most)" for hardware in MEASURED]
    return markdown(("fused / one launch per scheme", "launches", *head), rows)


def profile_phase() -> str:
    said = []
    for hardware in MEASURED:
        lost = profile(hardware)["phase_loss"]
        said.append(f"{percent(lost['median'])} at the median and {percent(lost['p95'])} at the 95th percentile")
    return f"{said[0]} of launches on the H100, {said[1]} on the H200"


@cache
def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def layer(workload: str) -> str:
    """Microseconds of a whole layer, by run and tokens."""
    us: dict[str, dict[int, float]] = {}
    for cell in read(MEASUREMENTS / "layer.json"):
        if cell["workload"] == workload:
            us.setdefault(cell["run"], {})[cell["T"]] = cell["us"]
    tokens = sorted(next(iter(us.values())))
    rows = [(run, *(digits(times[count]) for count in tokens)) for run, times in us.items()]
    return markdown((workload, *map(str, tokens)), rows)


def layer_summary() -> str:
    cells = read(MEASUREMENTS / "layer.json")
    us = {(cell["run"], cell["T"]): cell["us"] for cell in cells if cell["workload"] == "qwen1.5-moe"}
    ours, theirs = (
        [f"{us[run, count]:.0f}" for count in (1, 1024, 8192)] for run in ("hot", "transformers grouped_mm")
    )
    return (
        f"{ours[0]}, {ours[1]} and {ours[2]} us for 1, 1024 and 8192 tokens; the bfloat16 experts of transformers take"
        f" {theirs[0]}, {theirs[1]} and {theirs[2]}"
    )


def mixtures_predicted(case: str) -> str:
    """Predicted microseconds of a layer's GEMMs under the allocations of one case, by allocation and tokens."""
    us: dict[str, dict[int, float]] = {}
    for entry in read(ROOT / "benchmarks" / "mixed_allocations.json")["allocations"]:
        if entry["case"] == case:
            label = f"{entry['name']} bits" if entry["name"][0].isdigit() else entry["name"]
            us.setdefault(label, {})[entry["tokens"]] = entry["predicted_us"]
    tokens = sorted(next(iter(us.values())))
    rows = [(label, *(digits(times[count]) for count in tokens)) for label, times in us.items()]
    return markdown((case, *map(str, tokens)), rows)


GENERATE_RUNS = ("original", "w4a16", "hot")


def generate_steps() -> str:
    """Milliseconds of a decode step and of a prefill, and microseconds of the host."""
    names = {
        "generate": "`generate(...)`",
        "static": '`generate(..., cache_implementation="static")`',
        "graph": "the eager step with a static cache, captured in a CUDA graph by hand",
        "prefill": "prefill, sequences x tokens",
        "host": "microseconds of the host for one MoE module in a decode step, eager",
    }
    rows = []
    for part, label in names.items():
        cells = read(MEASUREMENTS / "generate.json")[part]
        for batch, times in cells.items():
            shape = "#.3g" if part in ("generate", "static", "graph") else ".0f"
            figures = [f"{times[run]:{shape}}".rstrip(".") if run in times else "-" for run in GENERATE_RUNS]
            rows.append((label if batch == next(iter(cells)) else "", batch, *figures))
    return markdown(("", "sequences", *GENERATE_RUNS), rows)


def _fastest(batch: str) -> dict[str, float]:
    """Milliseconds of a decode step by run, the original's by the fastest of all ways."""
    measured = read(MEASUREMENTS / "generate.json")
    ways = [
        measured[part][batch]["original"]
        for part in ("generate", "static", "graph")
        if "original" in measured[part][batch]
    ]
    return measured["static"][batch] | {"original": min(ways)}


def generate_tokens() -> str:
    """Tokens a second."""
    measured = read(MEASUREMENTS / "generate.json")
    rows = []
    for batch in measured["static"]:
        times = _fastest(batch)
        name = "one sequence" if batch == "1" else f"{batch} sequences"
        rows.append((name, *(f"{1e3 * int(batch) / times[run]:,.0f}" for run in GENERATE_RUNS)))
    prompts, times = list(measured["prefill"].items())[-1]
    sequences, tokens = map(int, prompts.split(" x "))
    rates = [f"{1e3 * sequences * tokens / times[run]:,.0f}" for run in GENERATE_RUNS]
    rows.append((f"prefill of {sequences} x {tokens} tokens", *rates))
    requests, rate = next(iter(measured["batching"].items()))
    rows.append((f"`generate_batch`, {requests} of mixed lengths", *(f"{rate[run]:,.0f}" for run in GENERATE_RUNS)))
    return markdown(("tokens a second", "original, bf16", "w4a16", "hot"), rows)


def generate_ratios() -> str:
    """Steps as multiples of the original's fastest."""
    rows = []
    for batch in read(MEASUREMENTS / "generate.json")["static"]:
        times = _fastest(batch)
        rows.append((batch, *(f"{times[run] / times['original']:.2f}" for run in GENERATE_RUNS[1:])))
    return markdown(("sequences", *GENERATE_RUNS[1:]), rows)


SERVING_RUNS = {
    "bf16": "vLLM, bfloat16 (Triton)",
    "FP8": "vLLM, FP8 w8a8 (CUTLASS)",
    "W4A16": "vLLM, W4A16 (Marlin, Machete)",
    "w8a8_fp8": "w8a8_fp8, this plugin",
    "5": "a solved mixture of 5 bits, this plugin",
    "4.25": "a solved mixture of 4.25 bits, this plugin",
    "w4a16": "w4a16, this plugin",
}


def serving(part: str) -> str:
    """Figures of a part by run and size: ``graph``, ``step``, ``first token`` in milliseconds."""
    figures = _serving()
    sizes = [name.removeprefix(f"{part} ") for name in figures["w4a16"] if name.startswith(f"{part} ")]
    rows = [
        (label, *(f"{figures[run][f'{part} {size}']:#.3g}".rstrip(".") for size in sizes))
        for run, label in SERVING_RUNS.items()
    ]
    return markdown(("tokens of the prompt" if part == "first token" else "sequences", *sizes), rows)


def serving_http() -> str:
    """Tokens a second of the server."""
    figures = _serving()
    said = [
        f"{requests} requests at a time: {figures['w4a16'][cell]:,.0f} tokens a second under w4a16,"
        f" {figures['W4A16'][cell]:,.0f} under vLLM's W4A16"
        for requests in (64, 256)
        for cell in [f"tokens/s {requests}"]
    ]
    return "; ".join(said)


def _serving() -> dict[str, dict[str, float]]:
    """Figures by run, of all its rounds."""
    return {
        run: {k: v for one in found for k, v in one.items()}
        for run, found in read(MEASUREMENTS / "serving.json").items()
    }


def serving_families() -> str:
    """Largest differences of log-probabilities between vLLM and transformers, by family."""
    rows = []
    for family, found in read(MEASUREMENTS / "serving_families.json")["families"].items():
        packed = _difference(found["packed"])
        if "original, gaps filled" in found and not isinstance(found["packed"], str):
            packed += " *"
        rows.append((f"`{family}`", found["class"], _difference(found["original"]), packed))
    return markdown(("model_type", "model class", "original", "packed"), rows)


def _difference(found: float | str) -> str:
    return "does not run" if isinstance(found, str) else f"{found:.2g}".replace("e-0", "e-")


def mma_us() -> dict[tuple[str, str, int], float]:
    """(workload, run, tokens) -> microseconds of a layer's two launches by the kernels that a layer picks."""
    us: dict[tuple[str, str, int], float] = Counter()
    for cell in read(MEASUREMENTS / "mma.json"):
        if cell["picked"]:
            us[cell["workload"], cell["run"], cell["T"]] += cell["us"]
    return us


def mma() -> str:
    """Both architectures of the H100 on Qwen1.5-MoE, by tokens."""
    us = {(run, count): value for (workload, run, count), value in mma_us().items() if workload == "qwen1.5-moe"}
    tokens = sorted({count for _, count in us})
    rows = []
    for run in dict.fromkeys(run for run, _ in us):
        scheme, _, wgmma = run.partition(" ")
        cells = [digits(us[run, count]) for count in tokens]
        rows.append([f"`{scheme}`, {'`wgmma`' if wgmma else '`mma.sync`'}", *cells])
    return markdown(["tokens", *map(str, tokens)], rows)


def mma_peers() -> str:
    """Time of the peers over that of the kernels of ``mma.sync``: geometric means over tokens, and the extremes."""
    us, peers = mma_us(), read(MEASUREMENTS / "mma_peers.json")
    tokens = peers["tokens"]
    rows = []
    for run, peer in peers["schemes"].items():
        ratios = {
            workload: [theirs / us[workload, run, count] for theirs, count in zip(times, tokens, strict=True)]
            for workload, times in peer["us"].items()
        }
        every = [ratio for some in ratios.values() for ratio in some]
        means = [f"{geometric_mean(some):.2f}" for some in (*ratios.values(), every)]
        rows.append([f"`{run}`", peer["name"], *means, f"{min(every):.2f} to {max(every):.2f}"])
    workloads = next(iter(peers["schemes"].values()))["us"]
    return markdown(["", "peer", *workloads, "all", "single cells"], rows)


def mma_shares() -> str:
    """What the estimates count: shares of the tensor cores' peak by tokens of a tile."""
    rows = []
    for (kind, by_parts), shares in PEAK_SHARES.items():
        weights = "decoded or grouped" if by_parts else "as they are"
        rows.append([f"{kind}, weights {weights}", ", ".join(f"{n}: {percent(share)}" for n, share in shares.items())])
    return markdown(["tensor cores", "share of the peak by tokens of a tile"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "profile-machines": profile_machines,
    "profile-errors": profile_errors,
    "profile-summary": profile_summary,
    "profile-constants": profile_constants,
    "profile-fused": profile_fused,
    "profile-phase": profile_phase,
    "layer-qwen1.5-moe": lambda: layer("qwen1.5-moe"),
    "layer-deepseek-v2-lite": lambda: layer("deepseek-v2-lite"),
    "layer-mixtral-8x7b": lambda: layer("mixtral-8x7b"),
    "layer-summary": layer_summary,
    "mixtures-predicted": lambda: mixtures_predicted("qwen1.5-moe+shared"),
    "generate-steps": generate_steps,
    "generate-tokens": generate_tokens,
    "generate-ratios": generate_ratios,
    "serving-decode": lambda: serving("graph"),
    "serving-step": lambda: serving("step"),
    "serving-first": lambda: serving("first token"),
    "serving-http": serving_http,
    "serving-families": serving_families,
    "family-names": lambda: ", ".join(f"`{name}`" for name in sorted(FAMILIES)),
    "families": lambda: markdown(FAMILY_HEAD, family_rows()),
    "refused": lambda: markdown(("refused", "because"), refused_rows()),
    "mma": mma,
    "mma-peers": mma_peers,
    "mma-shares": mma_shares,
}


def filled(text: str) -> str:
    """``text`` with its regions as `TABLES` makes them now; `KeyError` for a name that it does not know."""
    return REGION.sub(
        lambda match: f"<!-- table: {match[1]} -->{match[2]}{TABLES[match[1]]()}{match[2]}<!-- end -->", text
    )


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(page)


if __name__ == "__main__":
    main()
