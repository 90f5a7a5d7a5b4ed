"""tasks: checkpoint x task of lm-evaluation-harness -> scores, for each of evaluate.tasks.

input    a packed checkpoint, or the original
output   one JSON file a checkpoint and task, so that a new task or checkpoint runs no other
"""

from mxmoe_steps.tasks import TasksOptions

ASKED = plan.asked_tasks(CONFIG)
TASK_SCORES = f"{OUT}/tasks/{{scored}}/{{task}}.json"
CHECKPOINTS = {name: [checkpoint_of(point)] for name, point in POINTS.items()}
SCORED = {"original": [], **CHECKPOINTS}
TASKS_CODE = (
    stamps("mxmoe_steps.tasks") if ASKED else {}
)  # the extra [eval] may be missing
TASK_PARAMS = {
    task: {
        "contents": CONTENTS.tasks(own["task_folder"]),
        "flags": flags(
            TasksOptions, CONFIG.model, CONFIG.evaluate, CONFIG.runtime, **own
        ),
    }
    for task, own in ASKED.items()
}
ORIGINAL_CONTENTS = {"model": CONTENTS.model(), "tokenizer": CONTENTS.tokenizer()}
for name, checkpoint in SCORED.items():
    for task, own in TASK_PARAMS.items():
        RESULTS.add(
            [TASK_SCORES.format(scored=name, task=task)],
            reads=checkpoint,
            **TASKS_CODE,
            **own,
            **({} if checkpoint else ORIGINAL_CONTENTS),
        )


rule tasks:
    input:
        checkpoint=lambda wildcards: kept(*SCORED[wildcards.scored]),
        remade_if_wrong=remade_if_wrong(TASK_SCORES),
    output:
        TASK_SCORES,
    log:
        f"{OUT}/logs/tasks/{{scored}}/{{task}}.log",
    benchmark:
        f"{OUT}/benchmarks/tasks/{{scored}}/{{task}}.tsv"
    wildcard_constraints:
        scored="|".join(map(re.escape, SCORED)),
        task="|".join(map(re.escape, ASKED)) or "(?!)",  # nothing matches
    threads: CONFIG.runtime.threads
    resources:
        mem_mb=memory("tasks"),
        gpu_mb=gpu_share("tasks"),
        whole_models=int(workflow.local_exec),
    params:
        **TASKS_CODE,
        flags=lambda wildcards: TASK_PARAMS[wildcards.task]["flags"],
        contents=lambda wildcards: TASK_PARAMS[wildcards.task]["contents"],
        original=lambda wildcards: (
            ORIGINAL_CONTENTS if not SCORED[wildcards.scored] else None
        ),
        model=lambda wildcards: (SCORED[wildcards.scored] or [MODEL_PATH])[0],
        made_from=made_from(TASK_SCORES),
    shell:
        "python -m mxmoe_steps.tasks {params.flags} --made-from {params.made_from} --model {params.model:q}"
        " --out {output:q} 2> {log:q}"
