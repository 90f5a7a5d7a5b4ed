"""evaluate: checkpoint x held-out text -> perplexity, KL divergence, size.

input    a packed checkpoint and the original's final hidden states
output   one JSON file of metrics; for the original also those hidden states
"""

EVALUATE_STAMPS = stamps("mxmoe_steps.evaluate", "torch", "transformers")
EVALUATE_TEXT = {
    "texts": CONFIG.evaluate.texts,
    **text_flags(CONFIG.evaluate.texts, CONFIG.evaluate),
}


rule evaluate_original:
    input:
        model_files(),
        text_files(CONFIG.evaluate.texts),
    output:
        metrics=f"{OUT}/evaluate/original.json",
        hidden=f"{OUT}/evaluate/original.safetensors",
    log:
        f"{OUT}/logs/evaluate/original.log",
    benchmark:
        f"{OUT}/benchmarks/evaluate/original.tsv"
    threads: CONFIG.runtime.threads
    params:
        **EVALUATE_STAMPS,
        flags=flags(**model_flags(), **EVALUATE_TEXT),
    shell:
        "python -m mxmoe_steps.evaluate {params.flags}"
        " --save-hidden {output.hidden:q} --out {output.metrics:q} 2> {log:q}"


rule evaluate:
    input:
        text_files(CONFIG.evaluate.texts),
        checkpoint=rules.quantize.output,
        reference=rules.evaluate_original.output.hidden,
    output:
        f"{OUT}/evaluate/{{point}}.json",
    log:
        f"{OUT}/logs/evaluate/{{point}}.log",
    benchmark:
        f"{OUT}/benchmarks/evaluate/{{point}}.tsv"
    threads: CONFIG.runtime.threads
    params:
        **EVALUATE_STAMPS,
        flags=flags(**(model_flags() | {"model": None}), **EVALUATE_TEXT),
    shell:
        "python -m mxmoe_steps.evaluate {params.flags} --model {input.checkpoint:q}"
        " --reference {input.reference:q} --out {output:q} 2> {log:q}"
