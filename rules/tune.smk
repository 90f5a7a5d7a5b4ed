"""tune: packed checkpoint x calibration text x original model -> a better checkpoint of the same size.

input    what `quantize` wrote, for the points of the sweep that are tuned, and what `capture` wrote of every domain; with
         runtime.layers_per_job, the mark of the job before
output   a checkpoint folder for `mxmoe_steps.load_quantized`

A job that is not the last leaves hidden states and tuned layers in POINT.borders, which the last removes.
"""

from mxmoe_steps.tune import TuneOptions

TUNED = f"{OUT}/tune/{{point}}"
TUNE_EXTENSIONS = plan.extensions_of_texts(CONFIG, DOMAINS)
TUNE_PARAMS = {
    **stamps("mxmoe_steps.tune", extensions=modules_of(TUNE_EXTENSIONS)),
    "model": CONTENTS.model(),
    "tokenizer": CONTENTS.tokenizer(),
    "texts": CONTENTS.texts(DOMAINS),
}
TUNE_FLAGS = flags(
    TuneOptions,
    CONFIG.model,
    CONFIG.calibrate,
    CONFIG.tune,
    CONFIG.runtime,
    model=MODEL_PATH,
    texts=DOMAINS,
    extensions=TUNE_EXTENSIONS,
    sources=plan.used_sources(CONFIG, DOMAINS),
)
for name, point in POINTS.items():
    if point.tuned:
        RESULTS.add(
            [TUNED.format(point=point.allocation)],
            reads=[CHECKPOINT.format(point=point.allocation), *CAPTURES],
            **TUNE_PARAMS,
            flags=TUNE_FLAGS,
        )
TUNE_MARK = f"{OUT}/parts/tune-{{point}}-{{border}}"


def checkpoint_of(point):
    """The folder of a point's checkpoint."""
    return (TUNED if point.tuned else CHECKPOINT).format(point=point.allocation)


rule tune_part:
    input:
        checkpoint=lambda wildcards: kept(CHECKPOINT.format(point=wildcards.point)),
        captured=upstream(*CAPTURES),
        before=lambda wildcards: expand(
            TUNE_MARK,
            point=wildcards.point,
            border=[k for k in PART_BORDERS if k < int(wildcards.border)][-1:],
        ),
    output:
        temp(touch(TUNE_MARK)),
    log:
        f"{OUT}/logs/tune/{{point}}-{{border}}.log",
    benchmark:
        f"{OUT}/benchmarks/tune/{{point}}-{{border}}.tsv"
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("tune"),
        gpu_mb=gpu_share("tune"),
    params:
        flags=just(TUNE_FLAGS),
        made_from=made_from(TUNED),
        out=lambda wildcards: TUNED.format(point=wildcards.point),
    shell:
        "python -m mxmoe_steps.tune {params.flags} --made-from {params.made_from} --checkpoint {input.checkpoint:q}"
        " --capture {input.captured:q} --until {wildcards.border} --out {params.out:q} 2> {log:q}"


rule tune:
    input:
        checkpoint=lambda wildcards: kept(CHECKPOINT.format(point=wildcards.point)),
        captured=upstream(*CAPTURES),
        before=expand(TUNE_MARK, border=PART_BORDERS[-1:], allow_missing=True),
        remade_if_wrong=remade_if_wrong(TUNED),
    output:
        directory(TUNED),
    log:
        f"{OUT}/logs/tune/{{point}}.log",
    benchmark:
        f"{OUT}/benchmarks/tune/{{point}}.tsv"
    priority: 1  # the longest job of a point: not last
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("tune"),
        gpu_mb=gpu_share("tune"),
    params:
        **TUNE_PARAMS,
        flags=just(TUNE_FLAGS),
        made_from=made_from(TUNED),
    shell:
        "python -m mxmoe_steps.tune {params.flags} --made-from {params.made_from} --checkpoint {input.checkpoint:q}"
        " --capture {input.captured:q} --out {output:q} 2> {log:q}"
