"""compile: candidate schemes -> GPU kernels, for profile.hardware: local.

input    nothing; needs the extra [cuda] and gcc, no GPU
output   a folder of libraries named by hashes of source and configuration, and the run-time library
"""


rule compile:
    output:
        directory("results/compile"),
    log:
        "results/logs/compile.log",
    benchmark:
        "results/benchmarks/compile.tsv"
    threads: CONFIG.runtime.threads
    params:
        **stamps("mxmoe_steps.compile"),
        flags=flags(schemes=PROFILED),
    shell:
        "python -m mxmoe_steps.compile {params.flags} --threads {threads} --out {output:q} 2> {log:q}"
