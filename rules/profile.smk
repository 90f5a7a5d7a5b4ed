"""profile: measurements or a data sheet -> the time model of a GPU.

input    what `measure` wrote; for a named GPU nothing: what is known of it comes with the package
output   one table for every candidate scheme; an estimate is labelled as one inside
"""

from mxmoe_steps.profile import ProfileOptions

HARDWARE = CONFIG.profile.hardware
IS_LOCAL = HARDWARE == "local"
PROFILE = f"{OUT}/profile/{HARDWARE}.parquet"
PROFILE_PARAMS = {
    **stamps("mxmoe_steps.profile"),
    "hardware": CONTENTS.hardware(HARDWARE),
}
PROFILE_FLAGS = flags(
    ProfileOptions,
    hardware=None if IS_LOCAL else HARDWARE,
    measurements=MEASURED if IS_LOCAL else None,
    schemes=TIMED,
)
RESULTS.add(
    [PROFILE],
    reads=[MEASURED] if IS_LOCAL else [],
    **PROFILE_PARAMS,
    flags=PROFILE_FLAGS,
)


rule profile:
    input:
        measurements=upstream(MEASURED) if IS_LOCAL else [],
        remade_if_wrong=remade_if_wrong(PROFILE),
    output:
        PROFILE,
    log:
        f"{OUT}/logs/profile.log",
    benchmark:
        f"{OUT}/benchmarks/profile.tsv"
    resources:
        mem_mb=memory("profile"),
    params:
        **{name: just(value) for name, value in PROFILE_PARAMS.items()},
        flags=just(PROFILE_FLAGS),
        made_from=made_from(PROFILE),
    shell:
        "python -m mxmoe_steps.profile {params.flags} --made-from {params.made_from} --out {output:q} 2> {log:q}"
