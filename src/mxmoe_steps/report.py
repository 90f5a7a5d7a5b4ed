"""report: the summary table, the figures and one self-contained HTML page.

Reads every evaluated checkpoint with its allocation, the trace, the losses and the GPU profile. Writes
summary.csv (a row per checkpoint), report.html and the figures as SVG files.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mxmoe_steps.atomic import atomic_path
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Count, Flag, InFile, InFiles, InFolder, OutFile, OutFolder, StepOptions, Tokens
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import DrawnLoss, Seeded


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
    traffic_text: Annotated[str, Flag("NAME")] = Field(description="traced text that times assume")
    tokens: list[Tokens] = Field(description="tokens in a step, for predicted times")
    steps: Count = Field(16, description="sampled steps that times average over")
    html: OutFile = Field(description="page to write")
    csv: OutFile = Field(description="table to write")
    figures: OutFolder = Field(description="folder for the SVG files")


_TOKEN_COUNTS = 8  # columns of predicted times; of more, some
_VARIES = 1.05  # predicted times that differ by less than this factor are called equal


def predicted_times(options: ReportOptions, allocations: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Checkpoint -> tokens in a step -> predicted microseconds of an MoE layer, the mean over layers."""
    from mxmoe_steps.allocation.blocks import read_losses
    from mxmoe_steps.reporting.figures import spread
    from mxmoe_steps.timing.predict import Tables, mean_layer_us
    from mxmoe_steps.timing.profile import read_profile
    from mxmoe_steps.timing.traffic import sample_traffic

    losses = read_losses(options.losses, "out_sq", False)
    blocks = losses.blocks
    experts = set(zip(blocks.layer.tolist(), blocks.expert.tolist(), strict=True))
    for name, allocation in allocations.items():
        assigned = {(layer, expert) for layer, expert, *_ in allocation["assignment"]}
        if allocation["model"] != losses.model or assigned != experts:
            raise UserError(
                f"allocation {name} and {options.losses[0]} are of different models; solve again for this one"
            )
    profile = read_profile(options.profile)
    times: dict[str, dict[int, float]] = {name: {} for name in allocations}
    for tokens in spread(sorted(options.tokens), _TOKEN_COUNTS):
        traffic = sample_traffic(options.trace, [options.traffic_text], tokens, "auto", options.steps, options.seed)
        if traffic.model != losses.model:
            raise UserError(
                f"{options.trace} and {options.losses[0]} are of different models; trace and calibrate one model"
            )
        tables: Tables = {}
        for name, allocation in allocations.items():
            times[name][tokens] = mean_layer_us(allocation, blocks, traffic, profile, tables)
    return times


def time_note(times: dict[str, dict[int, float]], facts: dict[str, Any], timed_as: dict[str, str]) -> str:
    """What the predicted times are, and at which token counts they tell checkpoints apart."""
    from mxmoe_steps.timing.sources import changed_kernels

    source = "a roofline estimate from the data sheet" if facts["estimate"] else "a model fitted to measured kernels"
    sentences = [f"Layer times are predicted for {facts['device']} by {source}."]
    if not facts["estimate"]:
        earlier = ", in an earlier version" if changed_kernels(facts["kernels"], facts["arch"]) else ""
        sentences.append(f"The kernels were {facts['source']}{earlier}. {held_out_errors(facts)}")
    for scheme, kernel in sorted(timed_as.items()):
        sentences.append(f"{scheme} has no kernel of its own: its time is an estimate, that of {kernel}.")
    for tokens in sorted(next(iter(times.values()))):
        values = [one[tokens] for one in times.values()]
        if max(values) < _VARIES * min(values):
            sentences.append(
                f"At {tokens} tokens in a step all checkpoints take within {100 * (_VARIES - 1):.0f} % of the same"
                f" time ({min(values):.1f} to {max(values):.1f} µs): GEMMs this small sit on launch latency, so the"
                " allocation there is decided by accuracy alone."
            )
    return " ".join(sentences)


def published_note(original: dict[str, Any]) -> list[str]:
    """What a reader must know of the original: its commit on the hub, and how its publisher quantized it."""
    sentences = []
    if original["name"] is not None:
        sentences.append(f"The original is commit {original['commit']} of {original['name']}.")
    if original["formats"]:
        formats, share = ", ".join(original["formats"]), original["bytes"] / original["bytes_16_bit"]
        sentences.append(
            f"The original was published in {formats}: {original['expert_bits']:.2f} bits an expert weight and"
            f" {original['bytes'] / 1e6:.2f} MB, {share:.1%} of its size in 16 bits. Losses and KL divergences"
            " are against what its weights mean."
        )
    return [" ".join(sentences)] if sentences else []


def held_out_errors(facts: dict[str, Any]) -> str:
    """How far the time model is off on launches it was not fitted to, beside how far repeats are apart."""
    parts = [
        f"{100 * error['median']:.1f} % (95th percentile {100 * error['p95']:.1f} %) on {error['problems']} launches"
        f" of {'one scheme' if kind == 'single' else 'mixed schemes'}"
        for kind, error in facts["errors"].items()
    ]
    repeat = facts["repeat_spread"]
    return (
        f"Median error of the model on launches that it was not fitted to: {' and '.join(parts)}; repeats of one launch"
        f" spread over {100 * repeat['median']:.1f} % (95th percentile {100 * repeat['p95']:.1f} %)."
    )


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


def measured_note(table: Any, facts: dict[str, Any] | None) -> list[str]:
    """Where the layers were timed, and how far predictions are off."""
    from statistics import median

    from mxmoe_steps.reporting.summary import prediction_errors

    if facts is None:
        return []
    errors = [
        f"{100 * median(map(abs, found)):.1f} % at {tokens} tokens"
        f" ({100 * min(found):+.1f} to {100 * max(found):+.1f} %)"
        for tokens, found in prediction_errors(table).items()
        if found
    ]
    off = f" The predicted times of their expert GEMMs are off by {'; '.join(errors)}." if errors else ""
    return [
        f"Layers were measured on {facts['device']} ({facts['date']}) under the routing of {facts['text']}; the"
        f" original's are transformers' bfloat16 experts, the faster of its implementations.{off}"
    ]


def read_inputs(options: ReportOptions) -> tuple[list[Any], dict[str, Any]]:
    """Evaluated checkpoints and, by name, the allocations of all but the original; a tuned one has that of another."""
    from mxmoe_steps.allocation.files import read_allocation
    from mxmoe_steps.evaluations import TUNED, read_evaluation
    from mxmoe_steps.reporting.summary import Checkpoint

    allocations = {path.stem: read_allocation(path) for path in options.allocations}
    checkpoints = []
    for path in options.evaluations:
        metrics, name = read_evaluation(path), path.stem
        allocation = allocations.get(name.removesuffix(TUNED) if metrics.get("tuned") else name)
        if metrics["allocation"] is None:
            checkpoints.append(Checkpoint(name, metrics, None))
            continue
        if allocation is None:
            raise UserError(f"{path}: no allocation of that name among --allocations")
        if not metrics["allocation"].items() <= allocation.items():
            raise UserError(f"{path}: was evaluated under another allocation; run quantize and evaluate again")
        checkpoints.append(Checkpoint(name, metrics, allocation))
    for path, checkpoint in zip(options.evaluations, checkpoints, strict=True):
        if checkpoint.metrics["texts"].keys() != checkpoints[0].metrics["texts"].keys():
            raise UserError(f"{path}: was evaluated on other texts than {options.evaluations[0]}; run evaluate again")
    if not any(checkpoint.allocation is None for checkpoint in checkpoints):
        raise UserError("--evaluations holds no evaluation of the original model")
    return checkpoints, allocations


def report(options: ReportOptions) -> None:
    """Write the table, the figures and the page."""
    from mxmoe_steps.allocation.files import read_frontier
    from mxmoe_steps.evaluations import TUNED
    from mxmoe_steps.reporting import figures
    from mxmoe_steps.reporting.page import domains_html, figure, page, table_html
    from mxmoe_steps.reporting.summary import domain_lines, headlines, summary_table
    from mxmoe_steps.reporting.tasks import read_task_scores, task_lines, tasks_figure, tasks_html, with_scores
    from mxmoe_steps.tables import LOSSES, PROFILE, TRAFFIC, read_table

    checkpoints, allocations = read_inputs(options)
    original = next(checkpoint.name for checkpoint in checkpoints if checkpoint.allocation is None)
    some = next(iter(allocations.values()))
    unpacked = [[layer, expert, *["w16a16"] * 3] for layer, expert, *_ in some["assignment"]]
    unquantized = {"assignment": unpacked, "model": some["model"], "timed_as": {}}
    times = predicted_times(options, {**allocations, original: unquantized})
    plain = {one.name: one.name.removesuffix(TUNED) for one in checkpoints}  # tuning changes no times
    times |= {name: times[other] for name, other in plain.items()}
    losses = {}
    for path in options.losses:
        rows, facts = read_table(LOSSES, path)
        losses[facts["scheme"]] = rows.to_pandas()
    tiles, profile_facts = read_table(PROFILE, options.profile)
    estimate = bool(profile_facts["estimate"])
    timed_facts, measured = measured_times(options, some["model"])
    measured |= {name: measured[other] for name, other in plain.items() if other in measured}
    table = summary_table(checkpoints, times, estimate, measured)
    scores = read_task_scores(options.tasks, table, some["model"])
    table = with_scores(table, scores)
    frontiers = [read_frontier(path) for path in options.frontiers]
    for path, (facts, _) in zip(options.frontiers, frontiers, strict=True):
        if facts["model"] != some["model"]:
            raise UserError(f"{path} and the allocations are of different models; run frontier again for this one")
    ordered = sorted(allocations.values(), key=lambda one: (one["budget_bits"], one["tokens"], one["granularity"]))
    maps = [one for one in ordered if one["granularity"] == "block"]
    drawn = {
        "quality": figures.quality(table),
        "speed": figures.speed(table, estimate),
        "frontier": figures.frontiers(frontiers, ordered, estimate),
        "allocation": figures.allocation(maps or ordered),
        "sensitivity": figures.sensitivity(losses, options.metric),
        "times": figures.times(tiles.to_pandas(), profile_facts),
        "traffic": figures.traffic(read_table(TRAFFIC, options.trace / "traffic.parquet")[0].to_pandas()),
    }
    lines = headlines(table) + domain_lines(checkpoints) + task_lines(table, scores)
    parts = [
        ("Checkpoints", TEXTS["table"], table_html(table, estimate)),
        ("Texts", TEXTS["domains"], domains_html(table)),
        *((HEADINGS[name], TEXTS[name], figure(svg)) for name, svg in drawn.items()),
    ]
    if scores:
        drawn["tasks"] = tasks_figure(table, scores)
        parts.insert(2, ("Tasks", TEXTS["tasks"], tasks_html(table, scores) + figure(drawn["tasks"])))
    timed_as = {scheme: kernel for one in allocations.values() for scheme, kernel in one["timed_as"].items()}
    notes = [time_note(times, profile_facts, timed_as), *published_note(checkpoints[0].metrics["published"])]
    notes += measured_note(table, timed_facts)
    html = page(f"Mixed-precision quantization of {options.title}", lines, notes, parts)
    for name, svg in drawn.items():
        _write(options.figures / f"{name}.svg", svg)
    _write(options.csv, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    _write(options.html, html)
    print("\n".join([f"report   {options.html}", f"summary  {options.csv}", *lines]), file=sys.stderr)


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


HEADINGS = {
    "quality": "Quality over size",
    "speed": "Quality over predicted time",
    "frontier": "Frontiers",
    "allocation": "Allocations",
    "sensitivity": "Sensitivity",
    "times": "Kernel times",
    "traffic": "Expert traffic",
}
TEXTS = {
    "table": "Bits count 16-bit scales and zero points, averaged over all weights of routed and shared experts. "
    "Perplexity and KL divergence are of the packed weights on held-out text. Uniform checkpoints use the best single "
    "scheme within the budget. MB are those of all weights on disk, also as shares of the original in 16 bits and as "
    "it was published; embeddings, attention and layers that predict tokens ahead are not experts and in no budget.",
    "domains": "Every text's KL divergence over that of the uniform checkpoint of the same budget and quantizer, and "
    "every calibration domain's predicted loss over that of the best single scheme within the budget; the worst first. "
    "Above 1 the mixture is worse there.",
    "tasks": "Scores on tasks of lm-evaluation-harness, with standard errors. Those within two standard errors of what "
    "guessing among the choices scores are at chance level: differences between them mean nothing. Checkpoints answer "
    "the same questions, so a difference between two of them is more certain than their errors suggest.",
    "quality": "Lower is better on both axes. All checkpoints of one column of markers obey the same budget.",
    "speed": "Each marker is a checkpoint. Left and down is better.",
    "frontier": "Every allocation that is best for some exchange rate between loss and time, as the solver predicts "
    "them; dots are the allocations that were chosen. Of many frontiers, some are drawn.",
    "allocation": "The scheme of every gate, up and down block; S is the shared expert. Of many allocations, some are "
    "drawn, from the smallest budget to the largest.",
    "sensitivity": "What quantizing one block alone does to the model, per scheme.",
    "times": "Left: the rate at which tiles of a prefill kernel multiply on a busy GPU. Right, where "
    "the GPU was measured: predicted over measured time of random launches that the model was not fitted to, with "
    "lines 20 % above and below.",
    "traffic": "How many tokens each expert gets, relative to an even split.",
}


def main() -> None:
    """Command line."""
    options = parse(ReportOptions, __doc__)
    figures = [options.figures / f"{name}.svg" for name in sorted([*HEADINGS, *(["tasks"] if options.tasks else [])])]
    with recorded(options.made_from, [options.html, options.csv, *figures]):
        report(options)


if __name__ == "__main__":
    run_cli(main)
