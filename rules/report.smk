"""report: everything -> summary.csv, report.html, figures.

input    every evaluation with its allocation, the trace, the profile; of the first quantizer of the sweep also the
         frontiers and losses
output   results/report.html, results/summary.csv, SVG figures
"""

DRAWN = CONFIG.sweep[0].quantizer[0]
FIGURES = [
    "allocation",
    "frontier",
    "quality",
    "sensitivity",
    "speed",
    "times",
    "traffic",
]


def drawn_frontiers():
    """Frontiers that a solver had to find: a uniform one is a list of schemes."""
    return [
        name
        for name, point in FRONTIERS.items()
        if point.quantizer == DRAWN and point.granularity != "uniform"
    ]


rule report:
    input:
        evaluations=[
            rules.evaluate_original.output.metrics,
            *expand(rules.evaluate.output, point=POINTS),
        ],
        allocations=expand(rules.solve.output, point=POINTS),
        frontiers=expand(rules.frontier.output, frontier=drawn_frontiers()),
        losses=expand(
            rules.calibrate.output.losses,
            quantizer=DRAWN,
            scheme=CONFIG.calibrate.schemes,
        ),
        trace=rules.trace.output,
        profile=rules.profile.output,
    output:
        html="results/report.html",
        csv="results/summary.csv",
        figures=expand(f"{OUT}/figures/{{figure}}.svg", figure=FIGURES),
    log:
        f"{OUT}/logs/report.log",
    benchmark:
        f"{OUT}/benchmarks/report.tsv"
    params:
        **stamps("mxmoe_steps.report", "matplotlib", "pandas"),
        flags=flags(
            title=MODEL,
            traffic_text=CONFIG.solve.traffic,
            tokens=sorted({tokens for grid in CONFIG.sweep for tokens in grid.tokens}),
            metric=CONFIG.solve.metric,
            seed=CONFIG.runtime.seed,
        ),
        trace=f"{OUT}/trace",
        figures=f"{OUT}/figures",
    shell:
        "python -m mxmoe_steps.report {params.flags} --evaluations {input.evaluations:q}"
        " --allocations {input.allocations:q} --frontiers {input.frontiers:q} --losses {input.losses:q} --trace {params.trace:q}"
        " --profile {input.profile:q} --figures {params.figures:q} --csv {output.csv:q} --html {output.html:q}"
        " 2> {log:q}"
