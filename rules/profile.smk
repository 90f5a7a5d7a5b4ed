"""profile: GPU x schemes -> tile times.

input    resources/profiles
output   one table for every candidate scheme; an estimate is labelled as one inside
"""


rule profile:
    input:
        "resources/profiles/hardware.json",
    output:
        f"results/profile/{CONFIG.profile.hardware}.parquet",
    log:
        f"results/profile/{CONFIG.profile.hardware}.log",
    benchmark:
        f"results/profile/{CONFIG.profile.hardware}.tsv"
    params:
        **stamps("mxmoe_steps.profile"),
        flags=flags(
            hardware=CONFIG.profile.hardware,
            schemes=[*CONFIG.calibrate.schemes, "w16a16"],
        ),
    shell:
        "python -m mxmoe_steps.profile {params.flags} --out {output:q} 2> {log:q}"
