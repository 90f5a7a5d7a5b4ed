"""extrapolate: losses x a larger model's layers and traffic x tile times -> loss against time at that size.

input    the losses of every candidate scheme, the profile; only where the configuration has the section
output   uniform schemes and frontiers, for every number of tokens
"""

from mxmoe_steps.extrapolate import ExtrapolateOptions

EXTRAPOLATED = f"{OUT}/extrapolate/{{quantizer}}.json"
DRAWN = CONFIG.sweep[0].quantizer[0]  # of several quantizers, the one that is drawn
EXTRAPOLATIONS = (
    [EXTRAPOLATED.format(quantizer=DRAWN)] if CONFIG.extrapolate is not None else []
)
EXTRAPOLATE_CODE = stamps("mxmoe_steps.extrapolate")
if CONFIG.extrapolate is not None:
    EXTRAPOLATE_FLAGS = flags(
        ExtrapolateOptions,
        CONFIG.extrapolate,
        candidates=CANDIDATES,
        metric=CONFIG.solve.metric,
        time_as=CONFIG.solve.time_as,
        seed=CONFIG.runtime.seed,
    )
    RESULTS.add(
        EXTRAPOLATIONS,
        reads=[*expand(LOSSES, quantizer=DRAWN, scheme=SCHEMES), PROFILE],
        **EXTRAPOLATE_CODE,
        flags=EXTRAPOLATE_FLAGS,
    )


rule extrapolate:
    input:
        losses=lambda wildcards: kept(
            *expand(LOSSES, quantizer=wildcards.quantizer, scheme=SCHEMES)
        ),
        profile=upstream(PROFILE),
        remade_if_wrong=remade_if_wrong(EXTRAPOLATED),
    output:
        EXTRAPOLATED,
    log:
        f"{OUT}/logs/extrapolate/{{quantizer}}.log",
    benchmark:
        f"{OUT}/benchmarks/extrapolate/{{quantizer}}.tsv"
    resources:
        mem_mb=memory("extrapolate"),
    params:
        **EXTRAPOLATE_CODE,
        flags=lambda wildcards: EXTRAPOLATE_FLAGS,
        made_from=made_from(EXTRAPOLATED),
    shell:
        "python -m mxmoe_steps.extrapolate {params.flags} --made-from {params.made_from} --losses {input.losses:q}"
        " --profile {input.profile:q} --out {output:q} 2> {log:q}"
