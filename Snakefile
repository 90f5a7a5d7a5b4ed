"""Mixed-precision quantization of MoE models: what can be asked for. The rules live in rules/."""

if not workflow.configfiles:

    configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/check.smk"
include: "rules/trace.smk"
include: "rules/capture.smk"
include: "rules/calibrate.smk"
include: "rules/compile.smk"
include: "rules/measure.smk"
include: "rules/profile.smk"
include: "rules/frontier.smk"
include: "rules/solve.smk"
include: "rules/extrapolate.smk"
include: "rules/quantize.smk"
include: "rules/tune.smk"
include: "rules/evaluate.smk"
include: "rules/tasks.smk"
include: "rules/time.smk"
include: "rules/report.smk"


if workflow.is_main_process:
    HASHES.save()


onsuccess:
    if RESULTS.is_made(REPORT["html"]):
        print(
            terminal_table(Path(REPORT["csv"]), Path(REPORT["html"])),
            file=sys.stderr,
        )


rule all:
    default_target: True
    input:
        list(RESULTS),
