"""report: everything -> summary.csv, report.html, figures.

input    every evaluation with its allocation, scores on tasks, the trace, the profile; of the first quantizer of the sweep
         also the frontiers and losses
output   results/report.html, results/summary.csv, SVG figures
"""

from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.kernels.architectures import ARCHITECTURES
from mxmoe_steps.report import ReportOptions
from mxmoe_steps.reporting.sections import CATEGORIES, SECTIONS, drawn_figures
from mxmoe_steps.reporting.terminal import terminal_table
from mxmoe_steps.timing.estimate import measured_file
from mxmoe_steps.timing.sources import kernel_hashes

DRAWN_FRONTIERS = [  # a solver had to find these; a uniform one is a list of schemes
    name
    for name, point in FRONTIERS.items()
    if point.quantizer == DRAWN and point.granularity != "uniform"
]
FIGURES = drawn_figures(
    without=[
        *([] if CONFIG.extrapolate else ["extrapolated"]),
        *([] if ASKED else ["tasks"]),
    ]
)
CAPTIONS = f"{STATE}/captions/{{figure}}.rst"
REPORT = {
    "html": "results/report.html",
    "csv": "results/summary.csv",
    "figures": expand(f"{OUT}/figures/{{figure}}.svg", figure=FIGURES),
}
REPORT_INPUTS = {
    "evaluations": [ORIGINAL["metrics"], *expand(EVALUATION, point=POINTS)],
    "allocations": expand(ALLOCATION, point=ALLOCATIONS),
    "frontiers": expand(FRONTIER, frontier=DRAWN_FRONTIERS),
    "losses": expand(LOSSES, quantizer=DRAWN, scheme=SCHEMES),
    "traffic": [TRACE_FILES["traffic"]],
    "routing": [TRACE_FILES["routing"]],
    "profile": [PROFILE],
    "extrapolation": EXTRAPOLATIONS,
    "tasks": expand(TASK_SCORES, scored=SCORED, task=ASKED),
    "times": [TIMES] if IS_LOCAL else [],
    "throughput": THROUGHPUT if IS_LOCAL else [],
}
REPORT_PARAMS = {
    **stamps("mxmoe_steps.report"),
    # Of kernels that were measured, the report says whether they are those of today.
    "kernels": (
        canonical_json({one.generator: kernel_hashes(one) for one in ARCHITECTURES})
        if HARDWARE == "local" or measured_file(HARDWARE)
        else None
    ),
}
REPORT_FLAGS = flags(
    ReportOptions,
    title=CONFIG.model.name,
    traffic_text=CONFIG.solve.traffic,
    tokens=sorted({tokens for grid in CONFIG.sweep for tokens in grid.tokens}),
    metric=CONFIG.solve.metric,
    seed=CONFIG.runtime.seed,
    config=plan.told(CONFIG),
)
RESULTS.add(
    [REPORT["html"], REPORT["csv"], *REPORT["figures"]],
    reads=[file for files in REPORT_INPUTS.values() for file in files],
    **REPORT_PARAMS,
    flags=REPORT_FLAGS,
)


def in_report(figure):
    """A figure with the caption and category that it has in `snakemake --report`."""
    caption = Path(CAPTIONS.format(figure=figure)).absolute()
    if workflow.is_main_process:
        caption.parent.mkdir(parents=True, exist_ok=True)
        caption.write_text(f"{SECTIONS[figure][1]}\n")
    return report(
        f"{OUT}/figures/{figure}.svg",
        caption=str(caption),
        category=CATEGORIES[figure],
        labels={"figure": SECTIONS[figure][0]},
    )


rule report:
    input:
        **{name: upstream(*files) for name, files in REPORT_INPUTS.items()},
        remade_if_wrong=remade_if_wrong(REPORT["html"]),
    output:
        html=REPORT["html"],
        csv=REPORT["csv"],
        figures=[in_report(figure) for figure in FIGURES],
    log:
        f"{OUT}/logs/report.log",
    benchmark:
        f"{OUT}/benchmarks/report.tsv"
    resources:
        mem_mb=memory("report"),
    params:
        **{name: just(value) for name, value in REPORT_PARAMS.items()},
        flags=just(REPORT_FLAGS),
        made_from=made_from(REPORT["html"]),
        trace=folder_of("traffic"),
        tasks=lambda wildcards, input: shlex.join(
            ["--tasks", *input.tasks] if input.tasks else []
        ),
        times=f"--times {shlex.quote(TIMES)}" if IS_LOCAL else "",
        throughput=lambda wildcards, input: shlex.join(
            ["--throughput", *input.throughput] if input.throughput else []
        ),
        extrapolation=" ".join(f"--extrapolation {file}" for file in EXTRAPOLATIONS),
        benchmarks=f"{OUT}/benchmarks",
        figures=lambda wildcards, output: str(Path(output.figures[0]).parent),
    shell:
        "python -m mxmoe_steps.report {params.flags} --made-from {params.made_from} --evaluations {input.evaluations:q}"
        " --allocations {input.allocations:q} --frontiers {input.frontiers:q} --losses {input.losses:q}"
        " --trace {params.trace:q} --profile {input.profile:q} {params.times} {params.throughput} {params.tasks}"
        " {params.extrapolation} --benchmarks {params.benchmarks:q} --figures {params.figures:q} --csv {output.csv:q}"
        " --html {output.html:q} 2> {log:q}"
