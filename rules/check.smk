"""check: model and texts are what the steps need; before the first job of a run that reads text.

It is no rule: its answer is no result, and nothing runs again because of it. A dry run leaves it out.
"""

import subprocess
import sys

CHECK_FLAGS = flags(
    model=CONFIG.model.path,
    dtype=CONFIG.model.dtype,
    trust_remote_code=CONFIG.model.trust_remote_code,
    seed=CONFIG.runtime.seed,
    **allocation_flags(),
    problem=tuple(
        [point.granularity, exact(point.budget_bits)] for point in FRONTIERS.values()
    ),
    sources=canonical_json(CONFIG.texts),
    trace=[CONFIG.trace.sequences, CONFIG.trace.length, *CONFIG.trace.texts],
    calibrate=[
        CONFIG.calibrate.sequences,
        CONFIG.calibrate.length,
        CONFIG.calibrate.text,
    ],
    evaluate=[
        CONFIG.evaluate.sequences,
        CONFIG.evaluate.length,
        *CONFIG.evaluate.texts,
    ],
)
READERS = {"trace", "trace_part", "capture", "capture_part", "evaluate_original"}


onstart:
    if READERS & {job.rule.name for job in workflow.dag.needrun_jobs()}:
        command = [
            sys.executable,
            "-m",
            "mxmoe_steps.check",
            *shlex.split(CHECK_FLAGS),
        ]
        if subprocess.run(command).returncode:
            raise WorkflowError(
                "No job was started: the error above says what to mend."
            )
