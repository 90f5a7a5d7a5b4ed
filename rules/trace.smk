"""trace: model x texts -> expert traffic.

input    the model and the texts that `flags` name; with runtime.layers_per_job, the mark of the job before
output   traffic.parquet (per text, layer and expert), routing.safetensors (expert ids of every token)

A job that is not the last leaves hidden states in trace.borders, which the last removes.
"""

TRACE_INPUTS = [*model_files(), *text_files(CONFIG.trace.texts)]
TRACE_PARAMS = {
    **stamps("mxmoe_steps.trace", "torch", "transformers"),
    "flags": flags(
        texts=CONFIG.trace.texts,
        **model_flags(),
        **text_flags(CONFIG.trace.texts, CONFIG.trace),
    ),
    "out": f"{OUT}/trace",
}
TRACE_MARK = f"{OUT}/parts/trace-{{border}}"


rule trace_part:
    input:
        TRACE_INPUTS,
        before=lambda wildcards: expand(
            TRACE_MARK,
            border=[k for k in part_borders() if k < int(wildcards.border)][-1:],
        ),
    output:
        temp(touch(TRACE_MARK)),
    log:
        f"{OUT}/logs/trace-{{border}}.log",
    benchmark:
        f"{OUT}/benchmarks/trace-{{border}}.tsv"
    threads: CONFIG.runtime.threads
    params:
        **TRACE_PARAMS,
    shell:
        "python -m mxmoe_steps.trace {params.flags} --until {wildcards.border}"
        " --out {params.out:q} 2> {log:q}"


rule trace:
    input:
        TRACE_INPUTS,
        before=expand(TRACE_MARK, border=part_borders()[-1:]),
    output:
        traffic=f"{OUT}/trace/traffic.parquet",
        routing=f"{OUT}/trace/routing.safetensors",
    log:
        f"{OUT}/logs/trace.log",
    benchmark:
        f"{OUT}/benchmarks/trace.tsv"
    threads: CONFIG.runtime.threads
    params:
        **TRACE_PARAMS,
    shell:
        "python -m mxmoe_steps.trace {params.flags} --out {params.out:q} 2> {log:q}"
