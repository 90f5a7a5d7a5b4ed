"""evaluate: perplexity of a checkpoint on held-out text, and its KL divergence from the original.

The original is evaluated first: ``--sources``, ``--texts``, ``--sequences`` and ``--length`` choose the text, and
``--save-reference`` keeps its tokens with the final hidden state of each. A quantized checkpoint is evaluated
against that file with its packed weights; the original's output distribution is recomputed from the hidden states
with the language-model head, which both share. That costs H numbers per token instead of a whole vocabulary of them.
One decoder layer is in memory at a time, and a run that was stopped goes on at the last finished one.
"""

import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from mxmoe_steps.atomic import write_json
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.evaluations import read_manifest
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import InFile, Names, OutFile
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.options.shared import Sources, TextThroughModel

if TYPE_CHECKING:
    from torch import Tensor

    from mxmoe_steps.models.borders import Borders
    from mxmoe_steps.models.families import ModelFolder
    from mxmoe_steps.models.streaming import StreamedModel


class EvaluateOptions(TextThroughModel):
    """Options of the step."""

    sources: Sources = Field({}, description="for the original: JSON object, name -> text source")
    texts: Names = Field([], description="text sources to evaluate on")
    save_reference: OutFile | None = Field(None, description="keep tokens and hidden states of the original here")
    reference: InFile | None = Field(None, description="what --save-reference kept: its text, and KL from it")
    out: OutFile = Field(description="JSON file to write")

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if (self.reference is None) == (not self.sources or not self.texts):
            raise ValueError("give either --reference, or --sources with --texts")
        return self


_MOST_NLL = 700.0  # nats; e to the power of more is no float64


def score(
    model: "StreamedModel", hidden: "Tensor", tokens: "Tensor", reference: "Tensor | None"
) -> tuple[float, float]:
    """Sums of ``nll`` and ``kl`` (original to model), in nats, over the predicted tokens of some sequences.

    ``hidden`` final hidden states [B, L, H], ``tokens`` int64 [B, L], ``reference``: hidden states of the original, or
    None; ``model.log_probs`` turns the former two kinds into log-probabilities, at most ``model.head_rows`` at a time.
    The first token of a sequence predicts, and is not predicted.
    """
    import torch

    nll = kl = 0.0
    rows, targets = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten().to(hidden.device)
    original = None if reference is None else reference[:, :-1].flatten(0, 1)
    for low in range(0, len(rows), model.head_rows):
        piece = slice(low, low + model.head_rows)
        log_q = model.log_probs(rows[piece])
        nll -= float(log_q.gather(-1, targets[piece].unsqueeze(-1)).double().sum())
        if original is not None:
            log_p = model.log_probs(original[piece].to(hidden.device, hidden.dtype))
            kl += float((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).sum())
    return nll, kl


class Reference:
    """What --save-reference kept of the original: its text, and its final hidden states, read as they are needed."""

    def __init__(self, path: Path, model: "StreamedModel") -> None:
        from mxmoe_steps.facts import ReferenceFacts
        from mxmoe_steps.models.raw import FLOATING, TensorFile
        from mxmoe_steps.models.rows import read_rows

        self.path = path
        if not self.path.is_file():
            raise UserError(f"{path}: no such reference; evaluate the original with --save-reference first")
        self._file = file = TensorFile(self.path, "evaluate the original with --save-reference again")
        facts, config = file.facts(ReferenceFacts), model.config
        if model.folder.is_packed and facts["model"] != read_manifest(model.folder.path)["allocation"]["model"]:
            raise file.error(f"is of another model than {model.folder.path} was packed from")
        self.tokens = {}
        for text in facts["texts"]:
            name = f"tokens.{text}"
            shape = file.tensors[name].shape if name in file.tensors else ()
            shape = shape if len(shape) == 2 else (1, 2)
            file.tensor(name, ["I64"], shape).check()
            file.tensor(f"hidden.{text}", FLOATING, (*shape, config.hidden_size)).check()
            self.tokens[text] = read_rows(self.path, name, slice(None))
            if shape[1] < 2 or self.tokens[text].min() < 0 or self.tokens[text].max() >= config.vocab_size:
                raise file.error(f"{name} holds no text of {model.folder.path}")

    def hidden(self, text: str, rows: slice = slice(None)) -> "Tensor":
        """Final hidden states [S, L, H] of some sequences of a text; `UserError` for NaN or infinity."""
        from mxmoe_steps.models.rows import read_rows

        hidden = read_rows(self.path, f"hidden.{text}", rows)
        if not hidden.isfinite().all():
            raise self._file.error(f"hidden.{text} holds NaN or infinity")
        return hidden


def measure(
    model: "StreamedModel", borders: "Borders", texts: "dict[str, Tensor]", batch: int, reference: Reference | None,
    keep: Path | None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Metrics of every text, int64 [S, L], whose last border was reached; ``keep``: file for a reference."""
    import torch

    from mxmoe_steps.models.identity import fingerprint
    from mxmoe_steps.models.rows import read_rows, write_rows

    metrics = {}
    start = 0
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(model.head())
        if keep is not None:
            hidden_size = model.config.hidden_size
            layout = {f"tokens.{text}": (torch.int64, tuple(tokens.shape)) for text, tokens in texts.items()}
            layout |= {f"hidden.{text}": (model.dtype, (*tokens.shape, hidden_size)) for text, tokens in texts.items()}
            facts = {"model": fingerprint(model.folder), "texts": sorted(texts)}
            writer = stack.enter_context(write_rows(keep, layout, facts))
        for text, tokens in texts.items():
            sums = [0.0, 0.0]
            for low in range(0, len(tokens), batch):
                rows = slice(low, min(low + batch, len(tokens)))
                at = slice(start + rows.start, start + rows.stop)
                entering = read_rows(borders.hidden(model.layers), "hidden", at).to(model.device)
                hidden = model.final_norm(entering)
                original = reference.hidden(text, rows) if reference is not None else None
                sums = [old + new for old, new in zip(sums, score(model, hidden, tokens[rows], original), strict=True)]
                if keep is not None:
                    writer.append(f"tokens.{text}", tokens[rows])
                    writer.append(f"hidden.{text}", hidden)
            start += len(tokens)
            nll, kl = (total / (tokens.shape[0] * (tokens.shape[1] - 1)) for total in sums)
            if not (nll < _MOST_NLL and math.isfinite(kl)):
                raise UserError(f"{model.folder.path}: the loss on text {text!r} is {nll}, the KL divergence {kl}")
            metrics[text] = {"nll": nll, "perplexity": math.exp(nll), "kl": kl}
            print(f"evaluate {text}: perplexity {metrics[text]['perplexity']:.3f}", file=sys.stderr, flush=True)
    return metrics


def known_facts(folder: "ModelFolder") -> dict[str, Any]:
    """What is known of a checkpoint, original or quantized: allocation summary, sizes, and how it was published."""
    from mxmoe_steps.models.inventory import other_bytes, published

    if folder.is_packed:
        manifest = read_manifest(folder.path)
        names = ("allocation", "weights_bytes", "other_bytes", "published", "tuned")
        return {name: manifest[name] for name in names if name in manifest}
    original = published(folder)
    known = {"weights_bytes": original["bytes"], "other_bytes": other_bytes(folder), "published": original}
    return {"allocation": None, **known}


def evaluate(options: EvaluateOptions) -> None:
    """Evaluate one checkpoint on every text."""
    import torch

    from mxmoe_steps.data.reading import read_texts
    from mxmoe_steps.models.borders import Borders, forward, runs_of, unwatched
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.loading import start_torch
    from mxmoe_steps.models.streaming import StreamedModel

    start_torch(options)
    path = resolve_model(options.model, packed=True, code=options.trust_remote_code)
    model = StreamedModel(path, options.dtype, options.device, options.trust_remote_code)
    known = known_facts(model.folder)
    if options.save_reference is not None and model.folder.is_packed:
        raise UserError("--save-reference keeps the original's hidden states; give --model the original")
    reference = None if options.reference is None else Reference(options.reference, model)
    if reference is None:
        found = read_texts(options, path, options.texts, "test")
        texts = {text: torch.from_numpy(tokens) for text, tokens in found.items()}
    else:
        texts = reference.tokens
    runs = runs_of([len(tokens) for tokens in texts.values()], options.batch)
    with Borders.locked(options):
        borders = Borders(model, torch.cat(list(texts.values())), "mxmoe_steps.evaluate", options)
        forward(model, borders, runs, model.layers, unwatched)
        metrics = measure(model, borders, texts, options.batch, reference, options.save_reference)
        mean = {key: sum(one[key] for one in metrics.values()) / len(metrics) for key in ("nll", "kl")}
        overall = mean | {"perplexity": math.exp(mean["nll"])}
        write_json(options.out, known | {"texts": metrics, "overall": overall})
        borders.remove()


def main() -> None:
    """Command line."""
    options = parse(EvaluateOptions, __doc__)
    with recorded(options.made_from, [file for file in (options.out, options.save_reference) if file is not None]):
        evaluate(options)


if __name__ == "__main__":
    run_cli(main)
