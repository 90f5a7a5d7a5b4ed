"""Tokens a second of whole models in transformers, as a user calls them: decode steps of ``generate``, and prefills.

A decode step is one of ``generate`` with a static cache, for which transformers compiles the model; a prefill is a
forward pass over prompts that keeps the last logits. Both include what the host does. Whatever is compared takes turns
in rounds of random order.
"""

import functools
import gc
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

SKIPPED = 8  # first steps of a call of generate
_ROOM = 0.8  # of the GPU's free memory for weights; caches and what a call computes take the rest

log = logging.getLogger("mxmoe_steps")

Load = Callable[[], AbstractContextManager[Any]]  # a model in memory for as long as a block takes


@dataclass(frozen=True)
class Workload:
    """Prompts, token ids [B, L], and what is timed on them; ``tokens`` in a step: B of a decode step, B x L of a
    prefill, or as many as were asked for."""

    phase: Literal["decode", "prefill"]
    tokens: int
    prompts: torch.Tensor

    @property
    def made(self) -> int:
        """Tokens that a step really has."""
        return len(self.prompts) if self.phase == "decode" else self.prompts.numel()

    def __str__(self) -> str:
        return f"{self.phase}, {self.tokens} tokens in a step"

    def ms(self, model: Any, generated: int) -> float:
        """Milliseconds of a step; ``generated`` tokens are made to time a decode step."""
        prompts = self.prompts.to(model.device)
        if self.phase == "decode":
            return decode_ms(model, prompts, generated, cache_implementation="static")
        return prefill_ms(model, prompts)


def workloads(text: torch.Tensor, decode: Sequence[int], prefill: Sequence[int], prompt: int) -> list[Workload]:
    """Decode steps of these numbers of sequences after ``prompt`` tokens, and prefills of these numbers of tokens.

    Prompts are the beginnings of the sequences of ``text`` [S, L], which come again where there are too few. A prefill
    has sequences of one length, so that up to one token a sequence may be missing.
    """
    count, length = text.shape

    def beginnings(sequences: int, tokens: int) -> torch.Tensor:
        return text[torch.arange(sequences) % count, :tokens]

    found = [Workload("decode", sequences, beginnings(sequences, min(prompt, length))) for sequences in decode]
    for tokens in prefill:
        sequences = -(-tokens // length)
        found.append(Workload("prefill", tokens, beginnings(sequences, tokens // sequences)))
    return found


@contextmanager
def step_starts(model: Any) -> Iterator[list[float]]:
    """Collects when each step of ``generate`` begins, in seconds."""
    starts: list[float] = []
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepare_inputs(*arguments: Any, **options: Any) -> Any:
        starts.append(time.perf_counter())
        return prepare(*arguments, **options)

    model.prepare_inputs_for_generation = prepare_inputs
    try:
        yield starts
    finally:
        del model.prepare_inputs_for_generation


def decode_ms(model: Any, prompts: torch.Tensor, generated: int, **options: Any) -> float:
    """Median milliseconds from step to step of ``generate``, without the first `SKIPPED`; no text ends early."""
    settings = {"max_new_tokens": generated, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with step_starts(model) as starts:
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings, **options)
    assert out.shape[1] == prompts.shape[1] + generated, f"{out.shape[1]} tokens"
    steps = zip(starts[SKIPPED:], starts[SKIPPED + 1 :], strict=False)
    return statistics.median(1e3 * (after - before) for before, after in steps)


def prefill_ms(model: Any, prompts: torch.Tensor) -> float:
    """Milliseconds of a forward pass over prompts [B, L]."""
    options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    with torch.no_grad():
        return wall_ms(lambda: model(prompts, **options))


def wall_ms(run: Callable[[], object]) -> float:
    """Milliseconds until ``run`` has returned and the GPU, if there is one, has finished."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return 1e3 * (time.perf_counter() - start)


def forget_compiled(models: Mapping[str, Any]) -> None:
    """Each workload is what a user compiles first."""
    torch._dynamo.reset()
    for model in models.values():
        model.__dict__.pop("_compiled_call", None)


@dataclass
class Rounds:
    """What was measured: milliseconds in every round by model and number of the workload; sentences that say what was
    not, and why; whether all models were in memory together and took turns."""

    works: Sequence[Workload]
    generated: int
    count: int
    seed: int
    ms: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    together: bool = True

    def of(self, loads: Mapping[str, tuple[int, Load]]) -> None:
        """Measure models, given the bytes of their weights and what loads them; all together, or else one after the
        other where they do not fit in the GPU's memory."""
        self.together = len(loads) == 1 or _fits(sum(size for size, _ in loads.values()))
        groups = [list(loads)] if self.together else [[name] for name in loads]
        while groups:
            group = groups.pop(0)
            if self._fit({name: loads[name][1] for name in group}):
                continue
            if len(group) > 1:
                self.together, groups = False, [[name] for name in group]
            else:
                self._leave_out(f"{group[0]} does not fit in the GPU's memory: its layers alone are timed")

    def _fit(self, loads: Mapping[str, Load]) -> bool:
        """Measure models that are in memory together; false, and nothing is kept, where they do not fit."""
        kept, said = dict(self.ms), list(self.left_out)
        fit = True
        try:
            self._measure(loads)
        except torch.OutOfMemoryError:
            fit, self.ms, self.left_out = False, kept, said
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return fit

    def _measure(self, loads: Mapping[str, Load]) -> None:
        with ExitStack() as stack:
            models = {name: stack.enter_context(load()) for name, load in loads.items()}
            for number, work in enumerate(self.works):
                forget_compiled(models)
                for name, ms in self._take_turns(models, work).items():
                    self.ms[name, number] = ms
                    rate = 1e3 * work.made / statistics.median(ms)
                    print(f"time: {name}: {work}: {rate:.0f} tokens a second", file=sys.stderr, flush=True)
                forget_compiled(models)

    def _take_turns(self, models: Mapping[str, Any], work: Workload) -> dict[str, list[float]]:
        """Milliseconds of every model that can do it, in every round after one that warms up and compiles."""
        shuffle = random.Random(self.seed)
        found: dict[str, list[float]] = {name: [] for name in models}
        with torch._dynamo.config.patch(recompile_limit=max(8, 2 * len(models))):  # models share code
            for turn in range(-1, self.count):
                for name in shuffle.sample(list(found), len(found)):
                    try:
                        ms = work.ms(models[name], self.generated)
                    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:  # of transformers
                        full = isinstance(error, torch.OutOfMemoryError)
                        if full and len(models) > 1:
                            raise
                        why = next(iter(str(error).splitlines()), type(error).__name__)
                        why = "it does not fit in the GPU's memory" if full else why
                        self._leave_out(f"{name}: {work}: {why}")
                        del found[name]
                        continue
                    if turn >= 0:
                        found[name].append(ms)
        return found

    def _leave_out(self, sentence: str) -> None:
        self.left_out.append(sentence)
        log.warning("time: %s", sentence)


def _fits(size: int) -> bool:
    if not torch.cuda.is_available():
        return True
    torch.cuda.empty_cache()
    return size < _ROOM * torch.cuda.mem_get_info()[0]
