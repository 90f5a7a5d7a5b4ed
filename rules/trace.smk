"""trace: model x texts -> expert traffic.

input    the model and the texts that `flags` name; with runtime.layers_per_job, the mark of the job before
output   traffic.parquet (per text, layer and expert), routing.safetensors (expert ids of every token)

A job that is not the last leaves hidden states in trace.borders, which the last removes.
"""

from mxmoe_steps.trace import TraceOptions

TRACED = sorted(CONFIG.trace.texts)
TRACE = f"{OUT}/trace"
TRACE_FILES = {
    "traffic": f"{TRACE}/traffic.parquet",
    "routing": f"{TRACE}/routing.safetensors",
}
TRACE_EXTENSIONS = plan.extensions_of_texts(CONFIG, TRACED)
TRACE_CODE = stamps(
    "mxmoe_steps.trace",
    without=PACKED_MODULES,
    extensions=modules_of(TRACE_EXTENSIONS),
)
TRACE_FLAGS = flags(
    TraceOptions,
    CONFIG.model,
    CONFIG.trace,
    CONFIG.runtime,
    model=MODEL_PATH,
    texts=TRACED,
    extensions=TRACE_EXTENSIONS,
    sources=plan.used_sources(CONFIG, TRACED),
)
TRACE_CONTENTS = {
    "model": CONTENTS.model(),
    "tokenizer": CONTENTS.tokenizer(),
    "texts": CONTENTS.texts(TRACED),
}
RESULTS.add(
    list(TRACE_FILES.values()), **TRACE_CODE, flags=TRACE_FLAGS, **TRACE_CONTENTS
)
TRACE_MARK = f"{OUT}/parts/trace-{{border}}"


rule trace_part:
    input:
        before=lambda wildcards: expand(
            TRACE_MARK,
            border=[k for k in PART_BORDERS if k < int(wildcards.border)][-1:],
        ),
    output:
        temp(touch(TRACE_MARK)),
    log:
        f"{OUT}/logs/trace-{{border}}.log",
    benchmark:
        f"{OUT}/benchmarks/trace-{{border}}.tsv"
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("trace"),
        gpu_mb=gpu_share("trace"),
    params:
        flags=just(TRACE_FLAGS),
        made_from=made_from(TRACE_FILES["traffic"]),
        out=just(TRACE),
    shell:
        "python -m mxmoe_steps.trace {params.flags} --made-from {params.made_from} --until {wildcards.border}"
        " --out {params.out:q} 2> {log:q}"


rule trace:
    input:
        before=expand(TRACE_MARK, border=PART_BORDERS[-1:]),
        remade_if_wrong=remade_if_wrong(TRACE_FILES["traffic"]),
    output:
        **TRACE_FILES,
    log:
        f"{OUT}/logs/trace.log",
    benchmark:
        f"{OUT}/benchmarks/trace.tsv"
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("trace"),
        gpu_mb=gpu_share("trace"),
    params:
        **TRACE_CODE,
        **TRACE_CONTENTS,
        flags=just(TRACE_FLAGS),
        made_from=made_from(TRACE_FILES["traffic"]),
        out=just(TRACE),
    shell:
        "python -m mxmoe_steps.trace {params.flags} --made-from {params.made_from} --out {params.out:q} 2> {log:q}"
