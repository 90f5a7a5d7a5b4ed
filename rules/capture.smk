"""capture: model x calibration text -> what enters every MoE layer.

input    the model and the text that `flags` name; with runtime.layers_per_job, the mark of the job before
output   a folder with one layer-NNN.safetensors per MoE layer (hidden states, routing, gradients)

With runtime.layers_per_job, jobs take the text up through the layers, then its gradient down, and leave their files
in capture.borders; the last one finishes and removes it.
"""

CAPTURE_INPUTS = [*model_files(), *text_files([CONFIG.calibrate.text])]
CAPTURE_PARAMS = {
    **stamps("mxmoe_steps.capture", "torch", "transformers"),
    "flags": flags(
        text=CONFIG.calibrate.text,
        no_gradient=not CONFIG.calibrate.gradient,
        **model_flags(),
        **text_flags([CONFIG.calibrate.text], CONFIG.calibrate),
    ),
    "out": f"{OUT}/capture",
}
CAPTURE_MARK = f"{OUT}/parts/capture-{{way}}-{{border}}"
CAPTURE_PARTS = expand(CAPTURE_MARK, way="until", border=part_borders())
if CONFIG.calibrate.gradient:
    CAPTURE_PARTS += expand(CAPTURE_MARK, way="down-to", border=part_borders()[::-1])


rule capture_part:
    input:
        CAPTURE_INPUTS,
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
    params:
        **CAPTURE_PARAMS,
    shell:
        "python -m mxmoe_steps.capture {params.flags} --{wildcards.way} {wildcards.border}"
        " --out {params.out:q} 2> {log:q}"


rule capture:
    input:
        CAPTURE_INPUTS,
        before=CAPTURE_PARTS[-1:],
    output:
        directory(CAPTURE_PARAMS["out"]),
    log:
        f"{OUT}/logs/capture.log",
    benchmark:
        f"{OUT}/benchmarks/capture.tsv"
    threads: CONFIG.runtime.threads
    params:
        **CAPTURE_PARAMS,
    shell:
        "python -m mxmoe_steps.capture {params.flags} --out {output:q} 2> {log:q}"
