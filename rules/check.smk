"""check: model and texts are what the steps need; before the first job of a run that reads text or asks tasks.

It is no rule: its answer is no result, and nothing runs again because of it. A dry run leaves it out.
"""

import subprocess
import sys

from mxmoe_steps.check import CheckOptions

READERS = {
    "trace",
    "trace_part",
    "capture",
    "capture_part",
    "evaluate_original",
    "tasks",
}


def reading(section, texts):
    """What a step will read."""
    return [section.sequences, section.length, *texts]


def check_flags(tasks):
    """All that the steps will read, the problems that they will solve, and the tasks that jobs will ask."""
    return flags(
        CheckOptions,
        CONFIG.model,
        CONFIG.runtime,
        CONFIG.solve,
        model=MODEL_PATH,
        device=CONFIG.runtime.device if workflow.local_exec else "cpu",
        extensions=CONFIG.extensions,
        sources=CONFIG.texts,
        trace=reading(CONFIG.trace, CONFIG.trace.texts),
        calibrate=reading(CONFIG.calibrate, DOMAINS),
        evaluate=reading(CONFIG.evaluate, CONFIG.evaluate.texts),
        tasks=tasks,
        task_folder=CONFIG.evaluate.task_folder,
        few_shot=[
            text for text in CONFIG.evaluate.few_shot if text.split("=")[0] in tasks
        ],
        candidates=CANDIDATES,
        problems=plan.least_budgets(FRONTIERS.values()),
    )


onstart:
    # Jobs of a cluster find their GPU elsewhere.
    if CONFIG.profile.hardware == "local" and workflow.local_exec and not has_gpu():
        raise WorkflowError(
            "profile.hardware: local measures this machine's GPU, and it has none:"
            " name a known GPU instead, e.g. h100"
        )
    jobs = list(workflow.dag.needrun_jobs())
    if READERS & {job.rule.name for job in jobs}:
        tasks = {job.wildcards.task for job in jobs if job.rule.name == "tasks"}
        command = [sys.executable, "-m", "mxmoe_steps.check"]
        if subprocess.run(
            command + shlex.split(check_flags(sorted(tasks)))
        ).returncode:
            raise WorkflowError(
                "No job was started: the error above says what to mend."
            )
