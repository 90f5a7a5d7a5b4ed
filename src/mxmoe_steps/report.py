"""report: the summary table, the figures and one self-contained HTML page.

Reads every evaluated checkpoint with its allocation, the trace, the losses and the GPU profile. Writes
summary.csv (a row per checkpoint), report.html and the figures as SVG files.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from mxmoe_steps.atomic import atomic_path
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Count, Flag, InFile, InFiles, InFolder, OutFile, OutFolder, StepOptions, Tokens
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import DrawnLoss, Seeded
from mxmoe_steps.reporting.sections import OPENING, SECTIONS, STEP_HEADS, drawn_figures
from mxmoe_steps.values import from_json

if TYPE_CHECKING:
    from mxmoe_steps.allocation.blocks import Blocks, Losses
    from mxmoe_steps.timing.profile import Profile
    from mxmoe_steps.timing.traffic import Traffic

_TOKEN_COUNTS = 8  # columns of predicted times; of more, some


class ReportOptions(DrawnLoss, Seeded, StepOptions):
    """Options of the step."""

    title: Annotated[str, Flag("NAME")] = Field(description="name of the model")
    evaluations: InFiles = Field(description="what evaluate wrote")
    allocations: InFiles = Field(description="what solve wrote")
    frontiers: InFiles = Field(description="frontiers to draw")
    losses: InFiles = Field(description="losses to draw, one per scheme")
    trace: InFolder = Field(description="folder that trace wrote")
    profile: InFile = Field(description="table that profile wrote")
    times: InFile | None = Field(None, description="what time wrote: measured times of the checkpoints' layers")
    extrapolation: InFile | None = Field(None, description="what extrapolate wrote: losses and times of a larger model")
    benchmarks: InFolder | None = Field(None, description="folder of Snakemake's benchmarks: what every job took")
    config: Annotated[dict[str, Any], BeforeValidator(from_json), Flag("JSON")] = Field(
        {}, description="the configuration, to be shown"
    )
    traffic_text: Annotated[str, Flag("NAME")] = Field(description="traced text that times assume")
    tokens: list[Tokens] = Field(description="tokens in a step, for predicted times")
    steps: Count = Field(16, description="sampled steps that times average over")
    html: OutFile = Field(description="page to write")
    csv: OutFile = Field(description="table to write")
    figures: OutFolder = Field(description="folder for the SVG files")


def measured_times(options: ReportOptions, model: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Facts of what `time` wrote, and its summary; None and nothing where it was not run."""
    from mxmoe_steps.tables import TIMES, read_table
    from mxmoe_steps.timing.times import summary

    if options.times is None:
        return None, {}
    rows, facts = read_table(TIMES, options.times)
    if facts["model"] != model:
        raise UserError(f"{options.times} and the allocations are of different models; run time again for this one")
    return facts, summary(rows.to_pylist())


def sampled_traffic(options: ReportOptions, model: str) -> "dict[int, Traffic]":
    """Tokens in a step -> sampled steps, of some of many token counts; `UserError` for a trace of another model."""
    from mxmoe_steps.reporting.figures.style import spread
    from mxmoe_steps.timing.traffic import sample_traffic

    found = {}
    for tokens in spread(sorted(options.tokens), _TOKEN_COUNTS):
        found[tokens] = sample_traffic(
            options.trace, [options.traffic_text], tokens, "auto", options.steps, options.seed
        )
        if found[tokens].model != model:
            raise UserError(
                f"{options.trace} and {options.losses[0]} are of different models; trace and calibrate one model"
            )
    return found


def predicted_times(
    allocations: dict[str, Any], blocks: "Blocks", traffic: "dict[int, Traffic]", profile: "Profile"
) -> dict[str, dict[int, float]]:
    """Checkpoint -> tokens in a step -> predicted microseconds of an MoE layer, the mean over layers."""
    from mxmoe_steps.timing.predict import Tables, mean_layer_us

    times: dict[str, dict[int, float]] = {name: {} for name in allocations}
    for tokens, steps in traffic.items():
        tables: Tables = {}
        for name, allocation in allocations.items():
            times[name][tokens] = mean_layer_us(allocation, blocks, steps, profile, tables)
    return times


def check_one_model(
    options: ReportOptions, losses: "Losses", allocations: dict[str, Any], read: dict[Path, str]
) -> None:
    """`UserError` unless allocations, losses and what was ``read``, a fingerprint for every file, are of one model."""
    blocks = losses.blocks
    experts = set(zip(blocks.layer.tolist(), blocks.expert.tolist(), strict=True))
    for name, allocation in allocations.items():
        assigned = {(layer, expert) for layer, expert, *_ in allocation["assignment"]}
        if allocation["model"] != losses.model or assigned != experts:
            raise UserError(
                f"allocation {name} and {options.losses[0]} are of different models; solve again for this one"
            )
    for path, model in read.items():
        if model != losses.model:
            raise UserError(f"{path} and the allocations are of different models; make it again for this one")


def report(options: ReportOptions) -> None:
    """Write the table, the figures and the page."""
    from mxmoe_steps.allocation.blocks import read_losses
    from mxmoe_steps.allocation.files import read_allocation, read_frontier
    from mxmoe_steps.evaluations import TUNED
    from mxmoe_steps.extrapolations import read_extrapolation
    from mxmoe_steps.reporting import extrapolated, notes
    from mxmoe_steps.reporting.checkpoints import read_checkpoints
    from mxmoe_steps.reporting.domains import domain_lines
    from mxmoe_steps.reporting.figures import blocks, checkpoints, frontiers, gpu
    from mxmoe_steps.reporting.figures.style import spread
    from mxmoe_steps.reporting.headline import answer
    from mxmoe_steps.reporting.origins import machine, provenance, steps_taken
    from mxmoe_steps.reporting.page import Section, figure, folded, page, plain_table
    from mxmoe_steps.reporting.summary import headlines, summary_table
    from mxmoe_steps.reporting.summary_html import domains_html, headline_html, table_html
    from mxmoe_steps.tables import LOSSES, PROFILE, TRAFFIC, read_table
    from mxmoe_steps.timing.profile import read_profile
    from mxmoe_steps.timing.roofline import layer_roofline

    allocations = {path.stem: read_allocation(path) for path in options.allocations}
    evaluated = read_checkpoints(options.evaluations, allocations)
    original = next(one for one in evaluated if one.allocation is None)
    some = next(iter(allocations.values()))
    unpacked = [[layer, expert, *["w16a16"] * 3] for layer, expert, *_ in some["assignment"]]
    unquantized = {"assignment": unpacked, "model": some["model"], "timed_as": {}}
    profile, calibrated = read_profile(options.profile), read_losses(options.losses, "out_sq", False)
    found = [read_frontier(path) for path in options.frontiers]
    larger = read_extrapolation(options.extrapolation) if options.extrapolation is not None else None
    read = {path: facts["model"] for path, (facts, _) in zip(options.frontiers, found, strict=True)}
    if options.extrapolation is not None and larger is not None:
        read[options.extrapolation] = larger["model"]
    check_one_model(options, calibrated, allocations, read)
    traffic = sampled_traffic(options, calibrated.model)
    times = predicted_times({**allocations, original.name: unquantized}, calibrated.blocks, traffic, profile)
    plain = {one.name: one.name.removesuffix(TUNED) for one in evaluated}  # tuning changes no times
    times |= {name: times[other] for name, other in plain.items()}
    losses = {}
    for path in options.losses:
        rows, facts = read_table(LOSSES, path)
        losses[facts["scheme"]] = rows.to_pandas()
    tiles, profile_facts = read_table(PROFILE, options.profile)
    estimate = bool(profile_facts["estimate"])
    timed_facts, measured = measured_times(options, some["model"])
    measured |= {name: measured[other] for name, other in plain.items() if other in measured}
    table = summary_table(evaluated, times, estimate, measured)
    ordered = sorted(allocations.values(), key=lambda one: (one["budget_bits"], one["tokens"], one["granularity"]))
    maps = [one for one in ordered if one["granularity"] == "block"]
    best = answer(table)
    shown = some if best is None else allocations[plain[best["checkpoint"]]]
    layers = sorted({layer for layer, *_ in shown["assignment"]})
    roofs = [
        layer_roofline(shown, calibrated.blocks, traffic[tokens], profile, layers[len(layers) // 2])
        for tokens in spread(sorted(traffic), 2)
    ]
    drawn = {
        "quality": checkpoints.quality(table),
        "speed": checkpoints.speed(table, estimate),
        **({"extrapolated": frontiers.extrapolated(larger)} if larger is not None else {}),
        "frontier": frontiers.frontiers(found, ordered, estimate),
        "allocation": blocks.allocation(maps or ordered),
        "sensitivity": blocks.sensitivity(losses, options.metric),
        "losses": checkpoints.losses(table, options.metric),
        "traffic": blocks.traffic(read_table(TRAFFIC, options.trace / "traffic.parquet")[0].to_pandas()),
        "roofline": gpu.roofline(roofs, estimate),
        "times": gpu.times(tiles.to_pandas(), profile_facts),
    }
    html = {name: figure(svg) for name, svg in drawn.items()}
    lines = domain_lines(evaluated)
    if larger is not None:
        lines += extrapolated.lines(larger)
        html["extrapolated"] += plain_table(extrapolated.HEADS, extrapolated.verdicts(larger), text=0)
    origins = provenance(options.title, some["model"], original.metrics["published"], profile_facts)
    config = json.dumps(options.config, indent=1, ensure_ascii=False)
    html |= {
        "checkpoints": table_html(table, estimate),
        "texts": domains_html(table),
        "provenance": plain_table(["", ""], origins, text=2) + folded("Configuration", config),
    }
    if options.benchmarks is not None:
        html["run"] = plain_table(STEP_HEADS, steps_taken(options.benchmarks)) + f"<p>{machine()}.</p>"
    timed_as = {scheme: kernel for one in allocations.values() for scheme, kernel in one["timed_as"].items()}
    warnings = [notes.time_note(times, profile_facts, timed_as), *notes.published_note(original.metrics["published"])]
    warnings += notes.measured_note(table, timed_facts) + notes.starved_note(next(iter(losses.values())))
    sections = [Section(name, SECTIONS[name][0], SECTIONS[name][1], html[name]) for name in SECTIONS if name in html]
    title = f"Mixed-precision quantization of {options.title}"
    text = page(title, f"<p>{OPENING}</p>{headline_html(table, estimate)}", lines, warnings, sections)
    for name, svg in drawn.items():
        _write(options.figures / f"{name}.svg", svg)
    _write(options.csv, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    _write(options.html, text)
    print(
        "\n".join([f"report   {options.html}", f"summary  {options.csv}", *headlines(table), *lines]), file=sys.stderr
    )


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> None:
    """Command line."""
    options = parse(ReportOptions, __doc__)
    names = drawn_figures(options.extrapolation is not None)
    figures = [options.figures / f"{name}.svg" for name in names]
    with recorded(options.made_from, [options.html, options.csv, *figures]):
        report(options)


if __name__ == "__main__":
    run_cli(main)
