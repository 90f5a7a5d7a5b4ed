"""frontier: losses x traffic x tile times x bit budget -> the hull of loss against time.

input    the losses of every candidate scheme, the trace, the profile
output   every allocation that is optimal for some r
"""

from mxmoe_steps.frontier import FrontierOptions

FRONTIER = f"{OUT}/frontier/{{frontier}}.json"
FRONTIER_CODE = stamps("mxmoe_steps.frontier")
FRONTIER_FLAGS = {
    name: flags(
        FrontierOptions,
        CONFIG.solve,
        point,
        candidates=CANDIDATES,
        traffic_text=[CONFIG.solve.traffic],
        seed=CONFIG.runtime.seed,
        **plan.counted_domains(point),
    )
    for name, point in FRONTIERS.items()
}
for name, point in FRONTIERS.items():
    RESULTS.add(
        [FRONTIER.format(frontier=name)],
        reads=[
            *expand(LOSSES, quantizer=point.quantizer, scheme=SCHEMES),
            *TRACE_FILES.values(),
            PROFILE,
        ],
        **FRONTIER_CODE,
        flags=FRONTIER_FLAGS[name],
    )


rule frontier:
    input:
        losses=lambda wildcards: kept(
            *expand(
                LOSSES,
                quantizer=FRONTIERS[wildcards.frontier].quantizer,
                scheme=SCHEMES,
            )
        ),
        traffic=upstream(TRACE_FILES["traffic"]),
        routing=upstream(TRACE_FILES["routing"]),
        profile=upstream(PROFILE),
        remade_if_wrong=remade_if_wrong(FRONTIER),
    output:
        FRONTIER,
    log:
        f"{OUT}/logs/frontier/{{frontier}}.log",
    benchmark:
        f"{OUT}/benchmarks/frontier/{{frontier}}.tsv"
    resources:
        mem_mb=memory("frontier"),
    params:
        **FRONTIER_CODE,
        flags=lambda wildcards: FRONTIER_FLAGS[wildcards.frontier],
        made_from=made_from(FRONTIER),
        trace=folder_of("traffic"),
    shell:
        "python -m mxmoe_steps.frontier {params.flags} --made-from {params.made_from} --losses {input.losses:q}"
        " --trace {params.trace:q} --profile {input.profile:q} --out {output:q} 2> {log:q}"
