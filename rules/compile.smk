"""compile: candidate schemes -> GPU kernels, for profile.hardware: local.

input    nothing; needs the extra [cuda] and gcc, no GPU
output   a folder of libraries named by hashes of source and configuration, and the run-time library
"""

from mxmoe_steps.compile import CompileOptions

COMPILED = f"{OUT}/compile"
COMPILE_CODE = stamps("mxmoe_steps.compile")
COMPILE_FLAGS = flags(CompileOptions, schemes=TIMED)
if CONFIG.profile.hardware == "local":
    RESULTS.add([COMPILED], **COMPILE_CODE, flags=COMPILE_FLAGS)


rule compile:
    input:
        remade_if_wrong=remade_if_wrong(COMPILED),
    output:
        directory(COMPILED),
    log:
        f"{OUT}/logs/compile.log",
    benchmark:
        f"{OUT}/benchmarks/compile.tsv"
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("compile"),
    params:
        **COMPILE_CODE,
        flags=just(COMPILE_FLAGS),
        made_from=made_from(COMPILED),
    shell:
        "python -m mxmoe_steps.compile {params.flags} --made-from {params.made_from} --threads {threads}"
        " --out {output:q} 2> {log:q}"
