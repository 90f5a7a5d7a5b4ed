"""time: checkpoints x this machine's GPU -> measured times of their layers, for profile.hardware: local.

input    every packed checkpoint, the trace's routing; for whole models also the text that was traced
output   one row per timed launch of a checkpoint's layer, beside the original in transformers; with time.whole_model one
         row per kind of step of each whole model: its milliseconds
"""

from mxmoe_steps.time import TimeOptions

TIMES = f"{OUT}/time/local.parquet"
TIMED_CHECKPOINTS = sorted(  # tuned or not, a checkpoint takes the same time
    {CHECKPOINT.format(point=point.allocation) for point in POINTS.values()}
)
THROUGHPUT = [f"{OUT}/time/throughput.parquet"] if CONFIG.time.whole_model else []
PROMPTED = [CONFIG.solve.traffic] if CONFIG.time.whole_model else []
TIME_EXTENSIONS = plan.extensions_of_texts(CONFIG, PROMPTED)
TIME_PARAMS = {
    **stamps("mxmoe_steps.time", extensions=modules_of(TIME_EXTENSIONS)),
    "model": CONTENTS.model(),
    **(
        {"tokenizer": CONTENTS.tokenizer(), "texts": CONTENTS.texts(PROMPTED)}
        if PROMPTED
        else {}
    ),
}
TIME_FLAGS = flags(
    TimeOptions,
    CONFIG.model,
    CONFIG.time,
    model=MODEL_PATH,
    checkpoints=TIMED_CHECKPOINTS,
    traffic_text=CONFIG.solve.traffic,
    tokens=sorted({tokens for grid in CONFIG.sweep for tokens in grid.tokens}),
    seed=CONFIG.runtime.seed,
    extensions=TIME_EXTENSIONS,
    sources=plan.used_sources(CONFIG, PROMPTED),
)
if IS_LOCAL:
    RESULTS.add(
        [TIMES, *THROUGHPUT],
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
        layers=TIMES,
        throughput=THROUGHPUT,
    log:
        f"{OUT}/logs/time.log",
    benchmark:
        f"{OUT}/benchmarks/time.tsv"
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("time"),
        gpu_mb=gpu_share("time"),
    params:
        **TIME_PARAMS,
        flags=just(TIME_FLAGS),
        made_from=made_from(TIMES),
        trace=folder_of("traffic"),
        throughput=" ".join(f"--throughput {shlex.quote(file)}" for file in THROUGHPUT),
    shell:
        "python -m mxmoe_steps.time {params.flags} --made-from {params.made_from} --trace {params.trace:q}"
        " {params.throughput} --threads {threads} --out {output.layers:q} 2> {log:q}"
