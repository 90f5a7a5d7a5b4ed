"""evaluate: checkpoint x held-out text -> perplexity, KL divergence, size.

input    a packed checkpoint, and the original's text and final hidden states
output   one JSON file of metrics; for the original also its text and those hidden states
"""

EVALUATE_STAMPS = stamps("mxmoe_steps.evaluate", "torch", "transformers")


rule evaluate_original:
    input:
        model_files(),
        text_files(CONFIG.evaluate.texts),
    output:
        metrics=f"{OUT}/evaluate/original.json",
        reference=f"{OUT}/evaluate/original.safetensors",
    log:
        f"{OUT}/logs/evaluate/original.log",
    benchmark:
        f"{OUT}/benchmarks/evaluate/original.tsv"
    threads: CONFIG.runtime.threads
    params:
        **EVALUATE_STAMPS,
        flags=flags(
            texts=CONFIG.evaluate.texts,
            **model_flags(),
            **text_flags(CONFIG.evaluate.texts, CONFIG.evaluate),
        ),
    shell:
        "python -m mxmoe_steps.evaluate {params.flags}"
        " --save-reference {output.reference:q} --out {output.metrics:q} 2> {log:q}"


rule evaluate:
    input:
        checkpoint=rules.quantize.output,
        reference=rules.evaluate_original.output.reference,
    output:
        f"{OUT}/evaluate/{{point}}.json",
    log:
        f"{OUT}/logs/evaluate/{{point}}.log",
    benchmark:
        f"{OUT}/benchmarks/evaluate/{{point}}.tsv"
    threads: CONFIG.runtime.threads
    params:
        **EVALUATE_STAMPS,
        flags=flags(**(model_flags() | {"model": None})),
    shell:
        "python -m mxmoe_steps.evaluate {params.flags} --model {input.checkpoint:q}"
        " --reference {input.reference:q} --out {output:q} 2> {log:q}"
