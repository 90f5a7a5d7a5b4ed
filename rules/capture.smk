"""capture: model x calibration text -> what enters every MoE layer.

input    the model and the text that `flags` name; with runtime.layers_per_job, the mark of the job before
output   a folder with one layer-NNN.safetensors per MoE layer (hidden states, routing, gradients)

With runtime.layers_per_job, jobs take the text up through the layers, then its gradient down, and leave their files
in capture.borders; the last one finishes and removes it.
"""

from mxmoe_steps.capture import CaptureOptions

CAPTURE = f"{OUT}/capture"
CAPTURE_EXTENSIONS = plan.extensions_of_texts(CONFIG, [CONFIG.calibrate.text])
CAPTURE_CODE = stamps(
    "mxmoe_steps.capture",
    without=PACKED_MODULES,
    extensions=modules_of(CAPTURE_EXTENSIONS),
)
CAPTURE_FLAGS = flags(
    CaptureOptions,
    CONFIG.model,
    CONFIG.calibrate,
    CONFIG.runtime,
    model=MODEL_PATH,
    extensions=CAPTURE_EXTENSIONS,
    sources=plan.used_sources(CONFIG, [CONFIG.calibrate.text]),
)
CAPTURE_CONTENTS = {
    "model": CONTENTS.model(),
    "tokenizer": CONTENTS.tokenizer(),
    "texts": CONTENTS.texts([CONFIG.calibrate.text]),
}
RESULTS.add([CAPTURE], **CAPTURE_CODE, flags=CAPTURE_FLAGS, **CAPTURE_CONTENTS)
CAPTURE_MARK = f"{OUT}/parts/capture-{{way}}-{{border}}"
CAPTURE_PARTS = expand(CAPTURE_MARK, way="until", border=PART_BORDERS)
if CONFIG.calibrate.gradient:
    CAPTURE_PARTS += expand(CAPTURE_MARK, way="down-to", border=PART_BORDERS[::-1])


rule capture_part:
    input:
        before=lambda wildcards: CAPTURE_PARTS[
            : CAPTURE_PARTS.index(CAPTURE_MARK.format(**wildcards))
        ][-1:],
    output:
        temp(touch(CAPTURE_MARK)),
    log:
        f"{OUT}/logs/capture-{{way}}-{{border}}.log",
    benchmark:
        f"{OUT}/benchmarks/capture-{{way}}-{{border}}.tsv"
    wildcard_constraints:
        way="until|down-to",
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("capture"),
    params:
        flags=just(CAPTURE_FLAGS),
        made_from=made_from(CAPTURE),
        out=just(CAPTURE),
    shell:
        "python -m mxmoe_steps.capture {params.flags} --made-from {params.made_from}"
        " --{wildcards.way} {wildcards.border} --out {params.out:q} 2> {log:q}"


rule capture:
    input:
        before=CAPTURE_PARTS[-1:],
        remade_if_wrong=remade_if_wrong(CAPTURE),
    output:
        directory(CAPTURE),
    log:
        f"{OUT}/logs/capture.log",
    benchmark:
        f"{OUT}/benchmarks/capture.tsv"
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("capture"),
    params:
        **CAPTURE_CODE,
        **CAPTURE_CONTENTS,
        flags=just(CAPTURE_FLAGS),
        made_from=made_from(CAPTURE),
    shell:
        "python -m mxmoe_steps.capture {params.flags} --made-from {params.made_from} --out {output:q} 2> {log:q}"
