"""profile: measurements or a data sheet -> the time model of a GPU.

input    resources/profiles, or what `measure` wrote
output   one table for every candidate scheme; an estimate is labelled as one inside
"""

HARDWARE = CONFIG.profile.hardware


rule profile:
    input:
        "resources/profiles/hardware.json",
        rules.measure.output if HARDWARE == "local" else measurements_of(HARDWARE),
    output:
        f"results/profile/{HARDWARE}.parquet",
    log:
        f"results/profile/{HARDWARE}.log",
    benchmark:
        f"results/profile/{HARDWARE}.tsv"
    params:
        **stamps("mxmoe_steps.profile"),
        kernels=canonical_json(kernel_hashes()),
        flags=flags(
            hardware=None if HARDWARE == "local" else HARDWARE,
            measurements=rules.measure.output if HARDWARE == "local" else None,
            schemes=PROFILED,
        ),
    shell:
        "python -m mxmoe_steps.profile {params.flags} --out {output:q} 2> {log:q}"
