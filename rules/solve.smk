"""solve: frontier x r, or a ceiling on time or loss -> one allocation.

input    the frontier of the point's budget, token count, granularity and quantizer
output   allocation.json: a scheme for every block, with loss, time, bits, bound and gap
"""

from mxmoe_steps.solve import SolveOptions

ALLOCATION = f"{OUT}/solve/{{point}}.json"
SOLVE_CODE = stamps("mxmoe_steps.solve")
SOLVE_FLAGS = {
    name: flags(SolveOptions, **{point.goal: point.value})
    for name, point in ALLOCATIONS.items()
}
for name, point in ALLOCATIONS.items():
    RESULTS.add(
        [ALLOCATION.format(point=name)],
        reads=[FRONTIER.format(frontier=point.frontier)],
        **SOLVE_CODE,
        flags=SOLVE_FLAGS[name],
    )


rule solve:
    input:
        frontier=lambda wildcards: kept(
            FRONTIER.format(frontier=ALLOCATIONS[wildcards.point].frontier)
        ),
        remade_if_wrong=remade_if_wrong(ALLOCATION),
    output:
        ALLOCATION,
    log:
        f"{OUT}/logs/solve/{{point}}.log",
    benchmark:
        f"{OUT}/benchmarks/solve/{{point}}.tsv"
    resources:
        mem_mb=memory("solve"),
    params:
        **SOLVE_CODE,
        flags=lambda wildcards: SOLVE_FLAGS[wildcards.point],
        made_from=made_from(ALLOCATION),
    shell:
        "python -m mxmoe_steps.solve {params.flags} --made-from {params.made_from} --frontier {input.frontier:q}"
        " --out {output:q} 2> {log:q}"
