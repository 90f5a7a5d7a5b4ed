"""Text on its way through a streamed model: hidden states waiting in files at the borders between layers.

Border k is what enters decoder layer k; the border after the last layer enters the final norm. A border's file appears
when it is complete and after everything that was to be learned from the layers before it, so a run that was stopped
goes on from the furthest border it finds, and ranges of layers can be jobs of their own: the bytes are the same.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mxmoe_steps.atomic import working_in, write_json
from mxmoe_steps.errors import UserError
from mxmoe_steps.models.families import PACKED_MODULES
from mxmoe_steps.models.raw import tensors_of
from mxmoe_steps.models.rows import is_whole, read_rows, write_rows
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.options.shared import Waiting
from mxmoe_steps.provenance import file_marks, stamps

Routing = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden [T, H], expert ids [T, k], router weights [T, k]
Seen = Callable[[Routing], None]
Watch = Callable[[int], AbstractContextManager[Seen]]


class Borders:
    """A folder of border files for one text, tokens int64 [S, L], one model and one ``step`` with its options.

    What an earlier run with another text, model, code or option left there is removed, and so is what is damaged.
    ``layout``: of a border's file. A step with two streams has a ``stream`` folder for each; ``sources``: files besides
    the model's that decide what passes through.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokens: torch.Tensor,
        step: str,
        options: Waiting,
        stream: str = "",
        sources: Sequence[Path] = (),
    ) -> None:
        self.folder, self.tokens = options.waiting_room / stream, tokens
        key = {
            "options": options.deciding(),
            "code": stamps(step, without=() if model.folder.is_packed else PACKED_MODULES),
            "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "checkpoint": options.made_from or file_marks([*model.folder.sources, *sources]),
        }
        self.layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "hidden": (model.dtype, (*tokens.shape, model.config.hidden_size))
        }
        if not self._fits(key):
            for file in (self.folder / "key.json", *self.folder.glob("*.safetensors")):
                file.unlink(missing_ok=True)
            write_json(self.folder / "key.json", key)

    def _fits(self, key: Any) -> bool:
        """Whether an earlier run left this key, and what it learned of the layers behind it can be read."""
        try:
            known = json.loads((self.folder / "key.json").read_text(encoding="utf-8"))
            for file in self.folder.glob("*-*.safetensors"):
                if not file.name.startswith(("hidden-", "gradient-")):
                    tensors_of(file)
        except (OSError, ValueError, UserError):
            return False
        return bool(known == key)

    def has(self, path: Path) -> bool:
        """Whether a border's file, `hidden` or `gradient`, is there and undamaged."""
        return path.is_file() and is_whole(path, self.layout)

    @staticmethod
    def locked(options: Waiting) -> AbstractContextManager[None]:
        """Within the block no other process works in the same folder."""
        return working_in(options.waiting_room)

    def hidden(self, border: int) -> Path:
        """File of hidden states ``hidden`` [S, L, H]."""
        return self.folder / f"hidden-{border:03d}.safetensors"

    def gradient(self, border: int) -> Path:
        """File of the loss's gradient with respect to them, ``hidden`` [S, L, H]."""
        return self.folder / f"gradient-{border:03d}.safetensors"

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)


def runs_of(sequences: Sequence[int], batch: int) -> list[slice]:
    """Runs of at most ``batch`` sequences, none of which crosses from one text to the next."""
    runs = []
    start = 0
    for count in sequences:
        stop = start + count
        runs += [slice(low, min(low + batch, stop)) for low in range(start, stop, batch)]
        start = stop
    return runs


@contextmanager
def hooked(model: StreamedModel, layer: int, seen: Seen) -> Iterator[None]:
    """Call ``seen`` with the routing of a layer whenever it runs."""
    moe, family = model.moe(layer), model.family
    if family.scales_inputs:  # its experts are given all tokens, its router says which of them count
        top_k = model.config.num_experts_per_tok

        def routed(_module: nn.Module, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
            weights, expert_ids = output[0].topk(top_k, dim=-1)
            seen((args[0], expert_ids, weights))

        handle = moe.get_submodule(family.router).register_forward_hook(routed)
    else:
        factor = 1.0 if family.routed_factor is None else getattr(moe, family.routed_factor)
        handle = moe.experts.register_forward_pre_hook(lambda _, args: seen((args[0], args[1], args[2] * factor)))
    try:
        yield
    finally:
        handle.remove()


def unwatched(_layer: int) -> AbstractContextManager[Seen]:
    """The ``watch`` of a `forward` that only moves the text."""
    return nullcontext(lambda _: None)


@torch.no_grad()
def forward(
    model: StreamedModel, borders: Borders, runs: list[slice], last: int, watch: Watch, keep: bool = False
) -> None:
    """Bring the text to border ``last`` from the furthest border there is.

    ``watch(layer)``, for layers with experts, gives what to call with the routing of every run; files that it writes
    are complete before the next border appears. ``keep`` borders for a backward pass.
    Raises `UserError` naming layer and experts where an output is NaN or infinite.
    """
    reached = next((border for border in range(last, -1, -1) if borders.has(borders.hidden(border))), None)
    if reached is None:
        with (
            model.loaded(model.embedding),
            write_rows(borders.hidden(0), borders.layout, {"border": 0}) as writer,
        ):
            for run in runs:
                writer.append("hidden", model.embed(borders.tokens[run]))
        reached = 0
    for layer in range(reached, last):
        has_experts = layer in model.folder.moe_layers
        with (
            model.loaded(model.layer_path(layer)),
            write_rows(borders.hidden(layer + 1), borders.layout, {"border": layer + 1}) as writer,
            (watch if has_experts else unwatched)(layer) as seen,
        ):
            for run in runs:
                hidden = read_rows(borders.hidden(layer), "hidden", run).to(model.device)
                found: list[Routing] = []
                with hooked(model, layer, found.append) if has_experts else nullcontext():
                    output = model.run_layer(layer, hidden)
                check_output(model, layer, output, found)
                for routing in found:
                    seen(routing)
                writer.append("hidden", output)
        if not keep:
            borders.hidden(layer).unlink()


def check_output(model: StreamedModel, layer: int, output: torch.Tensor, found: list[Routing]) -> None:
    """`UserError` for NaN or infinity in a layer's output; names the experts that all bad tokens share."""
    bad = ~output.isfinite().all(-1).flatten()
    if not bad.any():
        return
    where = f"layer {layer}"
    for hidden, expert_ids, _ in found:
        if hidden[bad].isfinite().all():
            routed_to = [set(row) for row in expert_ids[bad].tolist()]
            common = set.intersection(*routed_to)
            where += f", experts {', '.join(map(str, sorted(common or set.union(*routed_to))))}"
        else:
            where += ", before its experts"
    raise UserError(
        f"{model.folder.path}: {where}: {int(bad.sum())} of {len(bad)} tokens leave it as NaN or infinity in"
        f" {str(model.dtype).removeprefix('torch.')}; set model.dtype to bfloat16 or float32, or check the weights"
    )
