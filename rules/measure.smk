"""measure: kernels x this machine's GPU -> times of launches, for profile.hardware: local.

input    what `compile` wrote
output   one row per launch: tiles at full occupancy, random whole problems
"""


rule measure:
    input:
        rules.compile.output,
    output:
        "results/measure/local.parquet",
    log:
        "results/logs/measure.log",
    benchmark:
        "results/benchmarks/measure.tsv"
    params:
        **stamps("mxmoe_steps.measure", "torch"),
        flags=flags(schemes=PROFILED),
    shell:
        "python -m mxmoe_steps.measure {params.flags} --kernels {input:q} --out {output:q} 2> {log:q}"


if CONFIG.profile.hardware == "local":

    onstart:
        require_gpu()
