"""frontier: losses x traffic x tile times x bit budget -> the hull of loss against time.

input    the losses of every candidate scheme, the trace, the profile
output   every allocation that is optimal for some r
"""


rule frontier:
    input:
        losses=lambda wildcards: expand(
            rules.calibrate.output.losses,
            quantizer=FRONTIERS[wildcards.frontier].quantizer,
            scheme=CONFIG.calibrate.schemes,
        ),
        trace=rules.trace.output,
        profile=rules.profile.output,
    output:
        f"{OUT}/frontier/{{frontier}}.json",
    log:
        f"{OUT}/logs/frontier/{{frontier}}.log",
    benchmark:
        f"{OUT}/benchmarks/frontier/{{frontier}}.tsv"
    params:
        **stamps("mxmoe_steps.frontier", "ortools"),
        flags=lambda wildcards: frontier_flags(FRONTIERS[wildcards.frontier]),
        trace=f"{OUT}/trace",
    shell:
        "python -m mxmoe_steps.frontier {params.flags} --losses {input.losses:q} --trace {params.trace:q}"
        " --profile {input.profile:q} --out {output:q} 2> {log:q}"
