"""trace: model x texts -> expert traffic.

input    the model and the texts that `flags` name
output   traffic.parquet (per text, layer and expert), routing.safetensors (expert ids of every token)
"""


rule trace:
    input:
        model_files(),
        text_files(CONFIG.trace.texts),
    output:
        traffic=f"{OUT}/trace/traffic.parquet",
        routing=f"{OUT}/trace/routing.safetensors",
    log:
        f"{OUT}/logs/trace.log",
    benchmark:
        f"{OUT}/benchmarks/trace.tsv"
    threads: CONFIG.runtime.threads
    params:
        **stamps("mxmoe_steps.trace", "torch", "transformers"),
        flags=flags(
            texts=CONFIG.trace.texts,
            **model_flags(),
            **text_flags(CONFIG.trace.texts, CONFIG.trace),
        ),
        out=f"{OUT}/trace",
    shell:
        "python -m mxmoe_steps.trace {params.flags} --out {params.out:q} 2> {log:q}"
