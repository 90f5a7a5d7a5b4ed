"""measure: kernels x this machine's GPU -> times of launches, for profile.hardware: local.

input    what `compile` wrote
output   one row per launch: tiles at full occupancy, random whole problems
"""

from mxmoe_steps.measure import MeasureOptions

MEASURED = f"{OUT}/measure/local.parquet"
MEASURE_CODE = stamps("mxmoe_steps.measure")
MEASURE_FLAGS = flags(MeasureOptions, schemes=TIMED)
if CONFIG.profile.hardware == "local":
    RESULTS.add([MEASURED], reads=[COMPILED], **MEASURE_CODE, flags=MEASURE_FLAGS)


rule measure:
    input:
        kernels=upstream(COMPILED),
        remade_if_wrong=remade_if_wrong(MEASURED),
    output:
        MEASURED,
    log:
        f"{OUT}/logs/measure.log",
    benchmark:
        f"{OUT}/benchmarks/measure.tsv"
    resources:
        mem_mb=memory("measure"),
        gpu_mb=gpu_share("measure"),
    params:
        **MEASURE_CODE,
        flags=just(MEASURE_FLAGS),
        made_from=made_from(MEASURED),
    shell:
        "python -m mxmoe_steps.measure {params.flags} --made-from {params.made_from} --kernels {input.kernels:q}"
        " --out {output:q} 2> {log:q}"
