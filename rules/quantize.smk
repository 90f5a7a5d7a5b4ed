"""quantize: model x allocation -> packed checkpoint.

input    the allocation, the packed weights of the candidate schemes, the original checkpoint
output   a checkpoint folder for `mxmoe_steps.load_quantized`
"""


rule quantize:
    input:
        model_files(),
        allocation=rules.solve.output,
        packed=lambda wildcards: expand(
            rules.calibrate.output.packed,
            quantizer=POINTS[wildcards.point].quantizer,
            scheme=CONFIG.calibrate.schemes,
        ),
    output:
        directory(f"{OUT}/quantize/{{point}}"),
    log:
        f"{OUT}/logs/quantize/{{point}}.log",
    benchmark:
        f"{OUT}/benchmarks/quantize/{{point}}.tsv"
    params:
        **stamps("mxmoe_steps.quantize"),
        flags=flags(
            model=CONFIG.model.path,
            trust_remote_code=CONFIG.model.trust_remote_code,
        ),
        packed=lambda wildcards: f"{OUT}/calibrate/{POINTS[wildcards.point].quantizer}",
    shell:
        "python -m mxmoe_steps.quantize {params.flags} --allocation {input.allocation:q}"
        " --packed {params.packed:q} --out {output:q} 2> {log:q}"
