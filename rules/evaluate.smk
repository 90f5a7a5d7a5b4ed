"""evaluate: checkpoint x held-out text -> perplexity, KL divergence, size.

input    a packed checkpoint, and the original's text and final hidden states
output   one JSON file of metrics; for the original also its text and those hidden states
"""

from mxmoe_steps.evaluate import EvaluateOptions

EVALUATED = sorted(CONFIG.evaluate.texts)
EVALUATION = f"{OUT}/evaluate/{{point}}.json"
ORIGINAL = {
    "metrics": f"{OUT}/evaluate/original.json",
    "reference": f"{OUT}/evaluate/original.safetensors",
}
EVALUATE_EXTENSIONS = plan.extensions_of_texts(CONFIG, EVALUATED)
ORIGINAL_PARAMS = {
    **stamps(
        "mxmoe_steps.evaluate",
        without=PACKED_MODULES,
        extensions=modules_of(EVALUATE_EXTENSIONS),
    ),
    "model": CONTENTS.model(),
    "tokenizer": CONTENTS.tokenizer(),
    "texts": CONTENTS.texts(EVALUATED),
}
ORIGINAL_FLAGS = flags(
    EvaluateOptions,
    CONFIG.model,
    CONFIG.evaluate,
    CONFIG.runtime,
    model=MODEL_PATH,
    texts=EVALUATED,
    extensions=EVALUATE_EXTENSIONS,
    sources=plan.used_sources(CONFIG, EVALUATED),
)
EVALUATE_CODE = stamps("mxmoe_steps.evaluate")
EVALUATE_FLAGS = flags(EvaluateOptions, CONFIG.model, CONFIG.runtime)
RESULTS.add(list(ORIGINAL.values()), **ORIGINAL_PARAMS, flags=ORIGINAL_FLAGS)
for name, point in POINTS.items():
    RESULTS.add(
        [EVALUATION.format(point=name)],
        reads=[checkpoint_of(point), ORIGINAL["reference"]],
        **EVALUATE_CODE,
        flags=EVALUATE_FLAGS,
    )


rule evaluate_original:
    input:
        remade_if_wrong=remade_if_wrong(ORIGINAL["metrics"]),
    output:
        **ORIGINAL,
    log:
        f"{OUT}/logs/evaluate/original.log",
    benchmark:
        f"{OUT}/benchmarks/evaluate/original.tsv"
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("evaluate"),
        gpu_mb=gpu_share("evaluate"),
    params:
        **ORIGINAL_PARAMS,
        flags=just(ORIGINAL_FLAGS),
        made_from=made_from(ORIGINAL["metrics"]),
    shell:
        "python -m mxmoe_steps.evaluate {params.flags} --made-from {params.made_from}"
        " --save-reference {output.reference:q} --out {output.metrics:q} 2> {log:q}"


rule evaluate:
    input:
        checkpoint=lambda wildcards: kept(checkpoint_of(POINTS[wildcards.point])),
        reference=upstream(ORIGINAL["reference"]),
        remade_if_wrong=remade_if_wrong(EVALUATION),
    output:
        EVALUATION,
    log:
        f"{OUT}/logs/evaluate/{{point}}.log",
    benchmark:
        f"{OUT}/benchmarks/evaluate/{{point}}.tsv"
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("evaluate"),
        gpu_mb=gpu_share("evaluate"),
    params:
        **EVALUATE_CODE,
        flags=just(EVALUATE_FLAGS),
        made_from=made_from(EVALUATION),
    shell:
        "python -m mxmoe_steps.evaluate {params.flags} --made-from {params.made_from} --model {input.checkpoint:q}"
        " --reference {input.reference:q} --out {output:q} 2> {log:q}"
