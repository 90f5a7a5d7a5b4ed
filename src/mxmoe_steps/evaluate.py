"""evaluate: perplexity of a checkpoint on held-out text, and its KL divergence from the original.

The original is evaluated first: ``--sources``, ``--texts``, ``--sequences`` and ``--length`` choose the text, and
``--save-reference`` keeps its tokens with the final hidden state of each. A quantized checkpoint is evaluated
against that file with its packed weights; the original's output distribution is recomputed from the hidden states
with the language-model head, which both share. That costs H numbers per token instead of a whole vocabulary of them.
One decoder layer is in memory at a time, and a run that was stopped goes on at the last finished one.
"""

import argparse
import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mxmoe_steps.arguments import add_borders, add_model, add_runtime, parser_for
from mxmoe_steps.atomic import write_json
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded


def score(model: Any, hidden: Any, tokens: Any, reference: Any | None) -> tuple[float, float]:
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

    def __init__(self, path: str) -> None:
        from mxmoe_steps.models.raw import tensors_of
        from mxmoe_steps.models.rows import read_rows

        if not Path(path).is_file():
            raise UserError(f"{path}: no such reference; evaluate the original with --save-reference first")
        names = sorted(name.removeprefix("tokens.") for name in tensors_of(Path(path)) if name.startswith("tokens."))
        if not names:
            raise UserError(f"{path}: holds no tokens; it is not what evaluate --save-reference writes")
        self.path = Path(path)
        self.tokens = {text: read_rows(self.path, f"tokens.{text}", slice(None)) for text in names}

    def hidden(self, text: str, rows: slice = slice(None)) -> Any:
        """Final hidden states [S, L, H] of some sequences of a text."""
        from mxmoe_steps.models.rows import read_rows

        return read_rows(self.path, f"hidden.{text}", rows)


def measure(model: Any, borders: Any, texts: dict[str, Any], batch: int, reference: Any, keep: str | None) -> Any:
    """Metrics of every text, int64 [S, L], whose last border was reached; ``keep``: file for a reference."""
    import torch

    from mxmoe_steps.models.rows import read_rows, write_rows

    metrics = {}
    start = 0
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(model.head())
        if keep is not None:
            hidden_size = model.model.config.hidden_size
            layout = {f"tokens.{text}": (torch.int64, tuple(tokens.shape)) for text, tokens in texts.items()}
            layout |= {f"hidden.{text}": (model.dtype, (*tokens.shape, hidden_size)) for text, tokens in texts.items()}
            writer = stack.enter_context(write_rows(Path(keep), layout, {"texts": sorted(texts)}))
        for text, tokens in texts.items():
            sums = [0.0, 0.0]
            for low in range(0, len(tokens), batch):
                rows = slice(low, min(low + batch, len(tokens)))
                at = slice(start + rows.start, start + rows.stop)
                entering = read_rows(borders.hidden(model.layers), "hidden", at).to(model.device)
                hidden = model.decoder.norm(entering)
                original = reference.hidden(text, rows) if reference is not None else None
                sums = [old + new for old, new in zip(sums, score(model, hidden, tokens[rows], original), strict=True)]
                if keep is not None:
                    writer.append(f"tokens.{text}", tokens[rows])
                    writer.append(f"hidden.{text}", hidden)
            start += len(tokens)
            nll, kl = (total / (tokens.shape[0] * (tokens.shape[1] - 1)) for total in sums)
            if not math.isfinite(nll):
                raise UserError(f"{model.folder.path}: the loss on text {text!r} is not finite")
            metrics[text] = {"nll": nll, "perplexity": math.exp(nll), "kl": kl}
            print(f"evaluate {text}: perplexity {metrics[text]['perplexity']:.3f}", file=sys.stderr, flush=True)
    return metrics


def known_facts(folder: Any) -> dict[str, Any]:
    """What is known of a checkpoint, original or quantized: allocation summary and size on disk."""
    manifest = folder.path / "mxmoe.json"
    if manifest.is_file():
        facts: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        return facts
    return {"allocation": None, "weights_bytes": sum(file.stat().st_size for file in set(folder.files.values()))}


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate one checkpoint on every text."""
    import torch

    from mxmoe_steps.data.reading import read_texts
    from mxmoe_steps.models.borders import Borders, forward, runs_of, unwatched
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.loading import start_torch
    from mxmoe_steps.models.streaming import StreamedModel

    if (args.reference is None) == (args.sources is None or args.texts is None):
        raise UserError("give either --reference, or --sources with --texts")
    start_torch(args)
    path = resolve_model(args.model)
    reference = None if args.reference is None else Reference(args.reference)
    if reference is None:
        found = read_texts(args, path, args.texts, "test")
        texts = {text: torch.from_numpy(tokens) for text, tokens in found.items()}
    else:
        texts = reference.tokens
    model = StreamedModel(path, args.dtype, args.device, args.trust_remote_code)
    runs = runs_of([len(tokens) for tokens in texts.values()], args.batch)
    with Borders.locked(args):
        borders = Borders(model, torch.cat(list(texts.values())), "mxmoe_steps.evaluate", args)
        forward(model, borders, runs, model.layers, unwatched)
        metrics = measure(model, borders, texts, args.batch, reference, args.save_reference)
        mean = {key: sum(one[key] for one in metrics.values()) / len(metrics) for key in ("nll", "kl")}
        overall = mean | {"perplexity": math.exp(mean["nll"])}
        write_json(args.out, known_facts(model.folder) | {"texts": metrics, "overall": overall})
        borders.remove()


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    add_model(parser)
    parser.add_argument("--sources", help="JSON object: name -> text source")
    parser.add_argument("--texts", nargs="+", metavar="NAME", help="sources to evaluate on")
    parser.add_argument("--sequences", type=int, default=32, help="sequences per text (default 32)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default 512)")
    parser.add_argument("--save-reference", metavar="FILE", help="keep tokens and hidden states, for the original")
    parser.add_argument("--reference", metavar="FILE", help="what --save-reference kept: its text, and KL from it")
    add_runtime(parser)
    add_borders(parser)
    parser.add_argument("--out", required=True, help="JSON file to write")
    args = parser.parse_args()
    with recorded(args.made_from, [file for file in (args.out, args.save_reference) if file is not None]):
        evaluate(args)


if __name__ == "__main__":
    run_cli(main)
