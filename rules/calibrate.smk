"""calibrate: captured layers x quantizer x scheme -> losses and packed weights.

input    what `capture` wrote, and the model's expert weights; with runtime.layers_per_job, the marks of the parts
output   SCHEME.parquet (loss per layer, expert and block), SCHEME.safetensors (packed weights)

With runtime.layers_per_job, jobs that need not wait for each other leave their layers in .SCHEME.layers beside the
output; the last one puts them together and removes it.
"""

CALIBRATE_PARAMS = {
    **stamps("mxmoe_steps.calibrate", "torch"),
    "flags": flags(
        model=CONFIG.model.path,
        damping=CONFIG.calibrate.damping,
        device=CONFIG.runtime.device,
        threads=CONFIG.runtime.threads,
        seed=CONFIG.runtime.seed,
    ),
    "out": lambda wildcards: f"{OUT}/calibrate/{wildcards.quantizer}",
}
CALIBRATE_MARK = f"{OUT}/parts/calibrate-{{quantizer}}-{{scheme}}-{{border}}"


rule calibrate_part:
    input:
        model_files(),
        captured=rules.capture.output,
    output:
        temp(touch(CALIBRATE_MARK)),
    log:
        f"{OUT}/logs/calibrate/{{quantizer}}-{{scheme}}-{{border}}.log",
    benchmark:
        f"{OUT}/benchmarks/calibrate/{{quantizer}}-{{scheme}}-{{border}}.tsv"
    threads: CONFIG.runtime.threads
    params:
        **CALIBRATE_PARAMS,
        end=lambda wildcards: int(wildcards.border) + CONFIG.runtime.layers_per_job,
    shell:
        "python -m mxmoe_steps.calibrate {params.flags} --capture {input.captured:q}"
        " --quantizer {wildcards.quantizer} --scheme {wildcards.scheme}"
        " --layers {wildcards.border} {params.end} --out {params.out:q} 2> {log:q}"


rule calibrate:
    input:
        model_files(),
        captured=rules.capture.output,
        parts=expand(
            CALIBRATE_MARK,
            border=[0, *part_borders()] if part_borders() else [],
            allow_missing=True,
        ),
    output:
        losses=f"{OUT}/calibrate/{{quantizer}}/{{scheme}}.parquet",
        packed=f"{OUT}/calibrate/{{quantizer}}/{{scheme}}.safetensors",
    log:
        f"{OUT}/logs/calibrate/{{quantizer}}-{{scheme}}.log",
    benchmark:
        f"{OUT}/benchmarks/calibrate/{{quantizer}}-{{scheme}}.tsv"
    threads: CONFIG.runtime.threads
    params:
        **CALIBRATE_PARAMS,
    shell:
        "python -m mxmoe_steps.calibrate {params.flags} --capture {input.captured:q}"
        " --quantizer {wildcards.quantizer} --scheme {wildcards.scheme} --out {params.out:q} 2> {log:q}"
