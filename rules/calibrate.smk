"""calibrate: captured layers x quantizer x scheme -> losses and packed weights.

input    what `capture` wrote, and the model's expert weights
output   SCHEME.parquet (loss per layer, expert and block), SCHEME.safetensors (packed weights)
"""


rule calibrate:
    input:
        model_files(),
        captured=rules.capture.output,
    output:
        losses=f"{OUT}/calibrate/{{quantizer}}/{{scheme}}.parquet",
        packed=f"{OUT}/calibrate/{{quantizer}}/{{scheme}}.safetensors",
    log:
        f"{OUT}/logs/calibrate/{{quantizer}}-{{scheme}}.log",
    benchmark:
        f"{OUT}/benchmarks/calibrate/{{quantizer}}-{{scheme}}.tsv"
    threads: CONFIG.runtime.threads
    params:
        **stamps("mxmoe_steps.calibrate", "torch"),
        flags=flags(
            model=CONFIG.model.path,
            damping=CONFIG.calibrate.damping,
            device=CONFIG.runtime.device,
            threads=CONFIG.runtime.threads,
            seed=CONFIG.runtime.seed,
        ),
        out=lambda wildcards: f"{OUT}/calibrate/{wildcards.quantizer}",
    shell:
        "python -m mxmoe_steps.calibrate {params.flags} --capture {input.captured:q}"
        " --quantizer {wildcards.quantizer} --scheme {wildcards.scheme} --out {params.out:q} 2> {log:q}"
