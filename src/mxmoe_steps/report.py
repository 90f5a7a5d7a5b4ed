"""report: the summary table, the figures and one self-contained HTML page.

Reads every evaluated checkpoint with its allocation, the trace, the losses and the GPU profile. Writes
summary.csv (a row per checkpoint), report.html and the figures as SVG files.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    from pandas import DataFrame

    from mxmoe_steps.allocation.blocks import Blocks, Losses
    from mxmoe_steps.allocation.pick import Part
    from mxmoe_steps.reporting.checkpoints import Checkpoint
    from mxmoe_steps.timing.profile import Profile
    from mxmoe_steps.timing.times import Rates
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
    tasks: InFiles = Field([], description="what tasks wrote, in a folder per checkpoint")
    times: InFile | None = Field(None, description="what time wrote: measured times of the checkpoints' layers")
    throughput: InFile | None = Field(None, description="what time wrote of whole models: tokens a second")
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


@dataclass(frozen=True)
class Measured:
    """What `time` wrote: facts of layers and of whole models, None where it was not run; and summaries of both."""

    layer_facts: dict[str, Any] | None
    whole_facts: dict[str, Any] | None
    layers: "dict[str, dict[int, dict[str, float]]]"
    rates: "Rates"

    def under(self, names: Mapping[str, str]) -> "Measured":
        """The same under other names too: new name -> the one that was measured."""
        layers = {name: self.layers[plain] for name, plain in names.items() if plain in self.layers}
        rates = {name: self.rates[plain] for name, plain in names.items() if plain in self.rates}
        return replace(self, layers=layers, rates=rates)


def read_measured(options: ReportOptions, model: str) -> Measured:
    """`UserError` for what was measured of another model."""
    from mxmoe_steps.tables import THROUGHPUT, TIMES, read_table
    from mxmoe_steps.timing.times import rates, summary

    found: dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None]] = {}
    for kind, path in ((TIMES, options.times), (THROUGHPUT, options.throughput)):
        if path is None:
            found[kind.name] = [], None
            continue
        rows, facts = read_table(kind, path)
        if facts["model"] != model:
            raise UserError(f"{path} and the allocations are of different models; run time again for this one")
        found[kind.name] = rows.to_pylist(), facts
    (layers, layer_facts), (whole, whole_facts) = found[TIMES.name], found[THROUGHPUT.name]
    return Measured(layer_facts, whole_facts, summary(layers), rates(whole))


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


@dataclass(frozen=True)
class Material:
    """What the report is made of, read and checked: all of one model."""

    allocations: "dict[str, dict[str, Any]]"
    evaluated: "list[Checkpoint]"
    calibrated: "Losses"
    tables: "dict[str, DataFrame]"  # losses by scheme
    frontiers: "list[tuple[dict[str, Any], list[Part]]]"
    larger: dict[str, Any] | None  # what extrapolate wrote
    profile: "Profile"
    tiles: "DataFrame"
    gpu: dict[str, Any]  # facts of the profile
    traffic: "dict[int, Traffic]"

    @property
    def original(self) -> "Checkpoint":
        """The evaluated original."""
        return next(one for one in self.evaluated if one.allocation is None)


def read_material(options: ReportOptions) -> Material:
    """Everything but measured times; `UserError` where files are damaged or of different models."""
    from mxmoe_steps.allocation.blocks import read_losses
    from mxmoe_steps.allocation.files import read_allocation, read_frontier
    from mxmoe_steps.extrapolations import read_extrapolation
    from mxmoe_steps.reporting.checkpoints import read_checkpoints
    from mxmoe_steps.tables import LOSSES, PROFILE, read_table
    from mxmoe_steps.timing.profile import read_profile

    allocations = {path.stem: read_allocation(path) for path in options.allocations}
    evaluated = read_checkpoints(options.evaluations, allocations)
    profile, calibrated = read_profile(options.profile), read_losses(options.losses, "out_sq", False)
    frontiers = [read_frontier(path) for path in options.frontiers]
    read = {path: facts["model"] for path, (facts, _) in zip(options.frontiers, frontiers, strict=True)}
    larger = None
    if options.extrapolation is not None:
        larger = read_extrapolation(options.extrapolation)
        read[options.extrapolation] = larger["model"]
    check_one_model(options, calibrated, allocations, read)
    tables = {}
    for path in options.losses:
        rows, facts = read_table(LOSSES, path)
        tables[facts["scheme"]] = rows.to_pandas()
    tiles, gpu = read_table(PROFILE, options.profile)
    traffic = sampled_traffic(options, calibrated.model)
    return Material(
        allocations, evaluated, calibrated, tables, frontiers, larger, profile, tiles.to_pandas(), gpu, traffic
    )


def summarize(material: Material, measured: Measured) -> "tuple[DataFrame, dict[str, dict[int, float]]]":
    """The summary table, and the predicted times in it; tuning changes no times."""
    from mxmoe_steps.evaluations import TUNED
    from mxmoe_steps.reporting.summary import summary_table

    some = next(iter(material.allocations.values()))
    unpacked = [[layer, expert, *["w16a16"] * 3] for layer, expert, *_ in some["assignment"]]
    allocations = material.allocations | {material.original.name: {"assignment": unpacked, "timed_as": {}}}
    times = predicted_times(allocations, material.calibrated.blocks, material.traffic, material.profile)
    plain = {one.name: one.name.removesuffix(TUNED) for one in material.evaluated}
    times |= {name: times[other] for name, other in plain.items()}
    here = measured.under(plain)
    return summary_table(material.evaluated, times, material.profile.estimate, here.layers, here.rates), times


def first_row(material: Material, table: "DataFrame") -> dict[str, Any]:
    """The allocation of the checkpoint that the page puts first; of any, if there is none of ours."""
    from mxmoe_steps.reporting.headline import answer

    best = answer(table)
    named = {one.name: one.allocation for one in material.evaluated if one.allocation is not None}
    return next(iter(named.values())) if best is None else named[best["checkpoint"]]


def draw(options: ReportOptions, material: Material, table: "DataFrame") -> dict[str, str]:
    """Name -> SVG of every figure."""
    from mxmoe_steps.reporting.figures import blocks, checkpoints, frontiers, gpu
    from mxmoe_steps.reporting.figures.style import spread
    from mxmoe_steps.tables import TRAFFIC, read_table
    from mxmoe_steps.timing.roofline import layer_roofline

    allocations, estimate = material.allocations, material.profile.estimate
    ordered = sorted(allocations.values(), key=lambda one: (one["budget_bits"], one["tokens"], one["granularity"]))
    shown = first_row(material, table)
    layers = sorted({layer for layer, *_ in shown["assignment"]})
    roofs = [
        layer_roofline(shown, material.calibrated.blocks, steps, material.profile, layers[len(layers) // 2])
        for _, steps in spread(sorted(material.traffic.items()), 2)
    ]
    return {
        "quality": checkpoints.quality(table),
        "speed": checkpoints.speed(table, estimate),
        **({"extrapolated": frontiers.extrapolated(material.larger)} if material.larger is not None else {}),
        "frontier": frontiers.frontiers(material.frontiers, ordered, estimate),
        "allocation": blocks.allocation([one for one in ordered if one["granularity"] == "block"] or ordered),
        "sensitivity": blocks.sensitivity(material.tables, options.metric),
        "losses": checkpoints.losses(table, options.metric),
        "traffic": blocks.traffic(read_table(TRAFFIC, options.trace / "traffic.parquet")[0].to_pandas()),
        "roofline": gpu.roofline(roofs, estimate),
        "times": gpu.times(material.tiles, material.gpu),
    }


def report(options: ReportOptions) -> None:
    """Write the table, the figures and the page."""
    from mxmoe_steps.reporting import extrapolated, notes
    from mxmoe_steps.reporting.domains import domain_lines
    from mxmoe_steps.reporting.measured import MEASURED_HEADS, measured_rows
    from mxmoe_steps.reporting.origins import machine, provenance, steps_taken
    from mxmoe_steps.reporting.page import Section, figure, folded, page, plain_table
    from mxmoe_steps.reporting.summary import headlines
    from mxmoe_steps.reporting.summary_html import domains_html, headline_html, table_html
    from mxmoe_steps.reporting.tasks import read_task_scores, task_lines, tasks_figure, tasks_html, with_scores

    material = read_material(options)
    model, published = material.calibrated.model, material.original.metrics["published"]
    estimate = material.profile.estimate
    measured = read_measured(options, model)
    table, times = summarize(material, measured)
    scores = read_task_scores(options.tasks, table, model)
    table = with_scores(table, scores)
    drawn = draw(options, material, table) | ({"tasks": tasks_figure(table, scores)} if scores else {})
    html = {name: figure(svg) for name, svg in drawn.items()}
    lines = domain_lines(material.evaluated) + task_lines(table, scores)
    if buys := first_row(material, table)["buys"]:
        head = "what more would give, from the first row's allocation"
        html["frontier"] += plain_table((head,), [(sentence,) for sentence in buys])
    if scores:
        html["tasks"] = tasks_html(table, scores) + html["tasks"]
    if material.larger is not None:
        lines += extrapolated.lines(material.larger)
        html["extrapolated"] += plain_table(extrapolated.HEADS, extrapolated.verdicts(material.larger), text=0)
    origins = plain_table(("what", "value"), provenance(options.title, model, published, material.gpu), text=2)
    config = json.dumps(options.config, indent=1, ensure_ascii=False)
    html |= {"checkpoints": table_html(table, estimate), "texts": domains_html(table)}
    if measured.layers or measured.rates:
        html["measured"] = plain_table(MEASURED_HEADS, measured_rows(table))
    html |= {"provenance": origins + folded("Configuration", config)}
    if options.benchmarks is not None:
        taken = steps_taken(options.benchmarks, [one.name for one in material.evaluated])
        html["run"] = plain_table(STEP_HEADS, taken) + f"<p>{machine()}.</p>"
    timed_as = {scheme: by for one in material.allocations.values() for scheme, by in one["timed_as"].items()}
    warnings = [notes.time_note(times, material.gpu, timed_as), *notes.published_note(published)]
    warnings += notes.measured_note(table, measured.layer_facts, measured.whole_facts)
    warnings += notes.starved_note(next(iter(material.tables.values())))
    sections = [Section(name, *SECTIONS[name], html[name]) for name in SECTIONS if name in html]
    title = f"Mixed-precision quantization of {options.title}"
    text = page(title, f"<p>{OPENING}</p>{headline_html(table, estimate)}", lines, warnings, sections)
    for name, svg in drawn.items():
        _write(options.figures / f"{name}.svg", svg)
    _write(options.csv, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    _write(options.html, text)
    written = [f"report   {options.html}", f"summary  {options.csv}"]
    print("\n".join([*written, *headlines(table), *lines]), file=sys.stderr)


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> None:
    """Command line."""
    options = parse(ReportOptions, __doc__)
    without = [] if options.extrapolation else ["extrapolated"]
    without += [] if options.tasks else ["tasks"]
    figures = [options.figures / f"{name}.svg" for name in drawn_figures(without)]
    with recorded(options.made_from, [options.html, options.csv, *figures]):
        report(options)


if __name__ == "__main__":
    run_cli(main)
