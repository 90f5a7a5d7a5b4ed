"""quantize: model x allocation -> packed checkpoint.

input    the allocation, the packed weights of the candidate schemes, the original checkpoint
output   a checkpoint folder for `mxmoe_steps.load_quantized`
"""

from mxmoe_steps.quantize import QuantizeOptions

CHECKPOINT = f"{OUT}/quantize/{{point}}"
QUANTIZE_PARAMS = {
    **stamps("mxmoe_steps.quantize"),
    "model": CONTENTS.model(),
    "copied": CONTENTS.copied(),
}
QUANTIZE_FLAGS = flags(QuantizeOptions, CONFIG.model, model=MODEL_PATH)
for name, point in ALLOCATIONS.items():
    RESULTS.add(
        [CHECKPOINT.format(point=name)],
        reads=[
            ALLOCATION.format(point=name),
            *expand(PACKED, quantizer=point.quantizer, scheme=SCHEMES),
        ],
        **QUANTIZE_PARAMS,
        flags=QUANTIZE_FLAGS,
    )


rule quantize:
    input:
        allocation=lambda wildcards: kept(ALLOCATION.format(point=wildcards.point)),
        packed=lambda wildcards: kept(
            *expand(
                PACKED,
                quantizer=ALLOCATIONS[wildcards.point].quantizer,
                scheme=SCHEMES,
            )
        ),
        remade_if_wrong=remade_if_wrong(CHECKPOINT),
    output:
        directory(CHECKPOINT),
    log:
        f"{OUT}/logs/quantize/{{point}}.log",
    benchmark:
        f"{OUT}/benchmarks/quantize/{{point}}.tsv"
    resources:
        mem_mb=memory("quantize"),
    params:
        **QUANTIZE_PARAMS,
        flags=just(QUANTIZE_FLAGS),
        made_from=made_from(CHECKPOINT),
        packed=folder_of("packed"),
    shell:
        "python -m mxmoe_steps.quantize {params.flags} --made-from {params.made_from}"
        " --allocation {input.allocation:q} --packed {params.packed:q} --out {output:q} 2> {log:q}"
