"""tasks: what a checkpoint, original or quantized, scores on a task of lm-evaluation-harness.

A task is one that lm-eval knows by name, alone or a group such as mmlu, or one that a YAML file of --task-folder
describes. Task and data are found before the model is loaded. The model is in memory whole, on a GPU with its packed
experts on the kernels where there are any. Needs the extra [eval].
"""

import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mxmoe_steps.atomic import write_json
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Count, Flag, InFolder, Natural, Options, OutFile, StepOptions
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import Forward, OfModel, Precision

if TYPE_CHECKING:
    from mxmoe_steps.harness.finding import Found


class Questions(Options):
    """How many questions."""

    task_limit: Annotated[Count | None, Flag("QUESTIONS")] = Field(
        None, description="only the first so many questions of a task, and of each task of a group: for a quick look"
    )


class TasksOptions(Questions, OfModel, Precision, Forward, StepOptions):
    """Options of the step."""

    task: Annotated[str, Flag("NAME")] = Field(description="task or group, as `python -m lm_eval ls tasks` lists them")
    task_folder: InFolder | None = Field(None, description="folder of YAML files with tasks of your own")
    shots: Annotated[Natural | None, Flag("EXAMPLES")] = Field(
        None, description="worked examples before each question (default: as the task says)"
    )
    out: OutFile = Field(description="JSON file to write")


_RESAMPLES = 1000  # for standard errors without a formula, which are then right within 2 %


@contextmanager
def asked_model(options: TasksOptions) -> Iterator[tuple[Any, Path, str]]:
    """The transformers model of ``options.model`` with all its weights, its folder, and what tells the original."""
    from mxmoe_steps.evaluations import read_manifest
    from mxmoe_steps.inference.whole import whole_model
    from mxmoe_steps.models.families import open_model, resolve_model
    from mxmoe_steps.models.identity import fingerprint
    from mxmoe_steps.models.loading import resolve_device

    device = resolve_device(options.device)
    path = resolve_model(options.model, packed=True, code=options.trust_remote_code)
    folder = open_model(path)
    of_model = read_manifest(path)["allocation"]["model"] if folder.is_packed else fingerprint(folder)
    with whole_model(path, options.dtype, str(device), options.trust_remote_code) as model:
        yield model, path, of_model


def ask(options: TasksOptions, found: "Found", model: Any, tokenizer: Any) -> dict[str, Any]:
    """What lm-eval makes of the model's answers."""
    import numpy as np
    import torch
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    from mxmoe_steps.harness.scoring import scores_of

    random.seed(options.seed)
    np.random.seed(options.seed)
    torch.manual_seed(options.seed)
    asked = HFLM(model, "causal", tokenizer=tokenizer, batch_size=options.batch, softmax_dtype="float32")
    results = evaluate(asked, found, options.task_limit, bootstrap_iters=_RESAMPLES, log_samples=False)
    return scores_of(found, options.task, results)


def tasks(options: TasksOptions) -> None:
    """Score one checkpoint on one task."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds between lines of progress in a log
    import torch

    from mxmoe_steps.harness.finding import find_task
    from mxmoe_steps.models.loading import load_tokenizer, start_torch

    start_torch(options)
    logging.getLogger("mxmoe_steps").setLevel(logging.INFO)  # says which layers run the kernels
    found = find_task(options.task, options.task_folder, options.shots, options.seed)
    try:
        with asked_model(options) as (model, path, of_model):
            tokenizer = load_tokenizer(path, options.trust_remote_code)
            scores = ask(options, found, model, tokenizer)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the model and a batch do not fit in the GPU's memory: lower runtime.batch, run fewer jobs on the GPU at a"
            " time, or set runtime.device: cpu"
        ) from error
    write_json(options.out, scores | {"model": of_model, "limit": options.task_limit})
    for score in scores["scores"]:
        spread = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
        chance = "" if score["chance"] is None else f", guessing {score['chance']:.4f}"
        print(f"tasks {options.task}: {score['metric']} {score['value']:.4f}{spread}{chance}", file=sys.stderr)


def main() -> None:
    """Command line."""
    options = parse(TasksOptions, __doc__)
    with recorded(options.made_from, [options.out]):
        tasks(options)


if __name__ == "__main__":
    run_cli(main)
