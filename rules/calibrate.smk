"""calibrate: captured layers x quantizer x scheme -> losses and packed weights.

input    what `capture` wrote of every domain, and the model's expert weights; with runtime.layers_per_job, the marks of the parts
output   SCHEME.parquet (loss per layer, expert and block), SCHEME.safetensors (packed weights)

With runtime.layers_per_job, jobs that need not wait for each other leave their layers in .SCHEME.layers beside the
output; the last one puts them together and removes it.
"""

from mxmoe_steps.calibrate import CalibrateOptions
from mxmoe_steps.quantizers.method import Method

CALIBRATE = f"{OUT}/calibrate/{{quantizer}}"
LOSSES = f"{CALIBRATE}/{{scheme}}.parquet"
PACKED = f"{CALIBRATE}/{{scheme}}.safetensors"
CALIBRATE_EXTENSIONS = {
    quantizer: plan.extensions_of_calibration(CONFIG, quantizer)
    for quantizer in CALIBRATED
}
CALIBRATE_FLAGS = {
    quantizer: flags(
        CalibrateOptions,
        CONFIG.runtime,
        model=MODEL_PATH,
        extensions=CALIBRATE_EXTENSIONS[quantizer],
        more_losses=plan.more_losses(CONFIG),
        damping=CONFIG.calibrate.damping if Method(quantizer).uses_hessians else None,
    )
    for quantizer in CALIBRATED
}
CALIBRATE_CODE = {
    quantizer: stamps(
        "mxmoe_steps.calibrate",
        without=Method(quantizer).unused_modules,
        extensions=modules_of(CALIBRATE_EXTENSIONS[quantizer]),
    )
    for quantizer in CALIBRATED
}
for quantizer in CALIBRATED:
    for scheme in SCHEMES:
        RESULTS.add(
            expand([LOSSES, PACKED], quantizer=quantizer, scheme=scheme),
            reads=CAPTURES,
            **CALIBRATE_CODE[quantizer],
            flags=CALIBRATE_FLAGS[quantizer],
            quantizer=quantizer,
            scheme=scheme,
            model=CONTENTS.model(),
        )
CALIBRATE_MARK = f"{OUT}/parts/calibrate-{{quantizer}}-{{scheme}}-{{border}}"


rule calibrate_part:
    input:
        captured=upstream(*CAPTURES),
    output:
        temp(touch(CALIBRATE_MARK)),
    log:
        f"{OUT}/logs/calibrate/{{quantizer}}-{{scheme}}-{{border}}.log",
    benchmark:
        f"{OUT}/benchmarks/calibrate/{{quantizer}}-{{scheme}}-{{border}}.tsv"
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("calibrate"),
        gpu_mb=gpu_share("calibrate"),
    params:
        flags=lambda wildcards: CALIBRATE_FLAGS[wildcards.quantizer],
        made_from=made_from(LOSSES),
        end=lambda wildcards: int(wildcards.border) + CONFIG.runtime.layers_per_job,
        out=lambda wildcards: CALIBRATE.format(quantizer=wildcards.quantizer),
    shell:
        "python -m mxmoe_steps.calibrate {params.flags} --made-from {params.made_from} --capture {input.captured:q}"
        " --quantizer {wildcards.quantizer} --scheme {wildcards.scheme}"
        " --layers {wildcards.border} {params.end} --out {params.out:q} 2> {log:q}"


rule calibrate:
    input:
        captured=upstream(*CAPTURES),
        parts=expand(
            CALIBRATE_MARK,
            border=[0, *PART_BORDERS] if PART_BORDERS else [],
            allow_missing=True,
        ),
        remade_if_wrong=remade_if_wrong(LOSSES),
    output:
        losses=LOSSES,
        packed=PACKED,
    log:
        f"{OUT}/logs/calibrate/{{quantizer}}-{{scheme}}.log",
    benchmark:
        f"{OUT}/benchmarks/calibrate/{{quantizer}}-{{scheme}}.tsv"
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("calibrate"),
        gpu_mb=gpu_share("calibrate"),
    params:
        code=lambda wildcards: CALIBRATE_CODE[wildcards.quantizer],
        model=CONTENTS.model(),
        flags=lambda wildcards: CALIBRATE_FLAGS[wildcards.quantizer],
        made_from=made_from(LOSSES),
        out=lambda wildcards: CALIBRATE.format(quantizer=wildcards.quantizer),
    shell:
        "python -m mxmoe_steps.calibrate {params.flags} --made-from {params.made_from} --capture {input.captured:q}"
        " --quantizer {wildcards.quantizer} --scheme {wildcards.scheme} --out {params.out:q} 2> {log:q}"
