"""check: model and texts are what the steps need; before the first job of a run that reads text.

It is no rule: its answer is no result, and nothing runs again because of it. A dry run leaves it out.
"""

import subprocess
import sys

READERS = {"trace", "trace_part", "capture", "capture_part", "evaluate_original"}


def least_budgets():
    """Granularity -> the smallest budget of the sweep: whoever meets it meets the others."""
    budgets = {}
    for point in FRONTIERS.values():
        least = budgets.get(point.granularity, point.budget_bits)
        budgets[point.granularity] = min(least, point.budget_bits)
    return budgets


def check_flags():
    """All that the steps will read, and the problems that they will solve."""

    def reads(section, texts):
        return [section.sequences, section.length, *texts]

    return flags(
        **allocation_flags(),
        model=MODEL_PATH,
        dtype=CONFIG.model.dtype,
        trust_remote_code=CONFIG.model.trust_remote_code,
        device=CONFIG.runtime.device if workflow.local_exec else "cpu",
        seed=CONFIG.runtime.seed,
        sources=canonical_json(CONFIG.texts),
        trace=reads(CONFIG.trace, CONFIG.trace.texts),
        calibrate=reads(CONFIG.calibrate, [CONFIG.calibrate.text]),
        evaluate=reads(CONFIG.evaluate, CONFIG.evaluate.texts),
        problem=tuple([kind, exact(bits)] for kind, bits in least_budgets().items()),
    )


onstart:
    # Jobs of a cluster find their GPU elsewhere.
    if CONFIG.profile.hardware == "local" and workflow.local_exec and not has_gpu():
        raise WorkflowError(
            "profile.hardware: local measures this machine's GPU, and it has none:"
            " name a known GPU instead, e.g. h100"
        )
    if READERS & {job.rule.name for job in workflow.dag.needrun_jobs()}:
        command = [sys.executable, "-m", "mxmoe_steps.check"]
        if subprocess.run(command + shlex.split(check_flags())).returncode:
            raise WorkflowError(
                "No job was started: the error above says what to mend."
            )
