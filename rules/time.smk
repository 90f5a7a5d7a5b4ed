"""time: checkpoints x this machine's GPU -> measured times of their layers, for profile.hardware: local.

input    every packed checkpoint, the trace's routing
output   one row per timed launch of a checkpoint's layer, beside the original in transformers
"""

from mxmoe_steps.time import TimeOptions

TIMES = f"{OUT}/time/local.parquet"
TIMED_CHECKPOINTS = sorted(  # tuned or not, a checkpoint takes the same time
    {CHECKPOINT.format(point=point.allocation) for point in POINTS.values()}
)
TIME_PARAMS = {**stamps("mxmoe_steps.time"), "model": CONTENTS.model()}
TIME_FLAGS = flags(
    TimeOptions,
    CONFIG.model,
    model=MODEL_PATH,
    checkpoints=TIMED_CHECKPOINTS,
    traffic_text=CONFIG.solve.traffic,
    tokens=sorted({tokens for grid in CONFIG.sweep for tokens in grid.tokens}),
    seed=CONFIG.runtime.seed,
)
if IS_LOCAL:
    RESULTS.add(
        [TIMES],
        reads=[*TIMED_CHECKPOINTS, TRACE_FILES["traffic"], TRACE_FILES["routing"]],
        **TIME_PARAMS,
        flags=TIME_FLAGS,
    )


rule time:
    input:
        checkpoints=upstream(*TIMED_CHECKPOINTS),
        traffic=upstream(TRACE_FILES["traffic"]),
        routing=upstream(TRACE_FILES["routing"]),
        remade_if_wrong=remade_if_wrong(TIMES),
    output:
        TIMES,
    log:
        f"{OUT}/logs/time.log",
    benchmark:
        f"{OUT}/benchmarks/time.tsv"
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("time"),
    params:
        **TIME_PARAMS,
        flags=just(TIME_FLAGS),
        made_from=made_from(TIMES),
        trace=folder_of("traffic"),
    shell:
        "python -m mxmoe_steps.time {params.flags} --made-from {params.made_from} --trace {params.trace:q}"
        " --threads {threads} --out {output:q} 2> {log:q}"
