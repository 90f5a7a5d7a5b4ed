"""report: everything -> summary.csv, report.html, figures.

input    every evaluation with its allocation, scores on tasks, the trace, the profile; of the first quantizer of the sweep
         also the frontiers and losses
output   results/report.html, results/summary.csv, SVG figures
"""

from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.kernels.architectures import ARCHITECTURES
from mxmoe_steps.report import ReportOptions
from mxmoe_steps.reporting.terminal import terminal_table
from mxmoe_steps.timing.estimate import measured_file
from mxmoe_steps.timing.sources import kernel_hashes

DRAWN = CONFIG.sweep[0].quantizer[0]
DRAWN_FRONTIERS = [  # a solver had to find these; a uniform one is a list of schemes
    name
    for name, point in FRONTIERS.items()
    if point.quantizer == DRAWN and point.granularity != "uniform"
]
FIGURES = [
    "allocation",
    "frontier",
    "quality",
    "sensitivity",
    "speed",
    *(["tasks"] if ASKED else []),
    "times",
    "traffic",
]
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
    "tasks": expand(TASK_SCORES, scored=SCORED, task=ASKED),
    "times": [TIMES] if IS_LOCAL else [],
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
)
RESULTS.add(
    [REPORT["html"], REPORT["csv"], *REPORT["figures"]],
    reads=[file for files in REPORT_INPUTS.values() for file in files],
    **REPORT_PARAMS,
    flags=REPORT_FLAGS,
)


rule report:
    input:
        **{name: upstream(*files) for name, files in REPORT_INPUTS.items()},
        remade_if_wrong=remade_if_wrong(REPORT["html"]),
    output:
        **REPORT,
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
        figures=lambda wildcards, output: str(Path(output.figures[0]).parent),
    shell:
        "python -m mxmoe_steps.report {params.flags} --made-from {params.made_from} --evaluations {input.evaluations:q}"
        " --allocations {input.allocations:q} --frontiers {input.frontiers:q} --losses {input.losses:q}"
        " --trace {params.trace:q} --profile {input.profile:q} {params.times} {params.tasks}"
        " --figures {params.figures:q} --csv {output.csv:q} --html {output.html:q} 2> {log:q}"
