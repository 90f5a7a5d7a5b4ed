"""capture: model x domain of the calibration text -> what enters every MoE layer.

input    the model and the domain that `flags` name; with runtime.layers_per_job, the mark of the job before
output   a folder with one layer-NNN.safetensors per MoE layer (hidden states, routing, gradients)

A domain is the calibration text, or a member of it where it is a mix: another member is one more capture.

With runtime.layers_per_job, jobs take the text up through the layers, then its gradient down, and leave their files
in capture/DOMAIN.borders; the last one finishes and removes it.
"""

from mxmoe_steps.capture import CaptureOptions

CAPTURE = f"{OUT}/capture/{{domain}}"
CAPTURES = expand(CAPTURE, domain=DOMAINS)
CAPTURE_EXTENSIONS = {
    domain: plan.extensions_of_texts(CONFIG, [domain]) for domain in DOMAINS
}
CAPTURE_PARAMS = {
    domain: {
        **stamps(
            "mxmoe_steps.capture",
            without=PACKED_MODULES,
            extensions=modules_of(CAPTURE_EXTENSIONS[domain]),
        ),
        "model": CONTENTS.model(),
        "tokenizer": CONTENTS.tokenizer(),
        "texts": CONTENTS.texts([domain]),
    }
    for domain in DOMAINS
}
CAPTURE_FLAGS = {
    domain: flags(
        CaptureOptions,
        CONFIG.model,
        CONFIG.calibrate,
        CONFIG.runtime,
        model=MODEL_PATH,
        text=domain,
        extensions=CAPTURE_EXTENSIONS[domain],
        sources=plan.used_sources(CONFIG, [domain]),
    )
    for domain in DOMAINS
}
for domain in DOMAINS:
    RESULTS.add(
        [CAPTURE.format(domain=domain)],
        **CAPTURE_PARAMS[domain],
        flags=CAPTURE_FLAGS[domain],
    )
CAPTURE_MARK = f"{OUT}/parts/capture-{{domain}}-{{way}}-{{border}}"
CAPTURE_PARTS = expand(
    CAPTURE_MARK, way="until", border=PART_BORDERS, allow_missing=True
)
if CONFIG.calibrate.gradient:
    CAPTURE_PARTS += expand(
        CAPTURE_MARK, way="down-to", border=PART_BORDERS[::-1], allow_missing=True
    )


def part_before(wildcards):
    """Input function: the mark of the job before, of the same domain."""
    marks = expand(CAPTURE_PARTS, domain=wildcards.domain)
    return marks[: marks.index(CAPTURE_MARK.format(**wildcards))][-1:]


rule capture_part:
    input:
        before=part_before,
    output:
        temp(touch(CAPTURE_MARK)),
    log:
        f"{OUT}/logs/capture/{{domain}}-{{way}}-{{border}}.log",
    benchmark:
        f"{OUT}/benchmarks/capture/{{domain}}-{{way}}-{{border}}.tsv"
    wildcard_constraints:
        way="until|down-to",
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("capture"),
        gpu_mb=gpu_share("capture"),
    params:
        flags=lambda wildcards: CAPTURE_FLAGS[wildcards.domain],
        made_from=made_from(CAPTURE),
        out=lambda wildcards: CAPTURE.format(domain=wildcards.domain),
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
        f"{OUT}/logs/capture/{{domain}}.log",
    benchmark:
        f"{OUT}/benchmarks/capture/{{domain}}.tsv"
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("capture"),
        gpu_mb=gpu_share("capture"),
    params:
        decided_by=lambda wildcards: CAPTURE_PARAMS[wildcards.domain],
        flags=lambda wildcards: CAPTURE_FLAGS[wildcards.domain],
        made_from=made_from(CAPTURE),
    shell:
        "python -m mxmoe_steps.capture {params.flags} --made-from {params.made_from} --out {output:q} 2> {log:q}"
