"""solve: frontier x r, or a ceiling on time or loss -> one allocation.

input    the frontier of the point's budget, token count, granularity and quantizer
output   allocation.json: a scheme for every block, with loss, time, bits, bound and gap
"""


rule solve:
    input:
        lambda wildcards: expand(
            rules.frontier.output, frontier=POINTS[wildcards.point].frontier
        ),
    output:
        f"{OUT}/solve/{{point}}.json",
    log:
        f"{OUT}/logs/solve/{{point}}.log",
    benchmark:
        f"{OUT}/benchmarks/solve/{{point}}.tsv"
    params:
        **stamps("mxmoe_steps.solve"),
        flags=lambda wildcards: flags(
            **{POINTS[wildcards.point].goal: POINTS[wildcards.point].value}
        ),
    shell:
        "python -m mxmoe_steps.solve {params.flags} --frontier {input:q} --out {output:q} 2> {log:q}"
