"""evaluate: perplexity of a checkpoint on held-out text, and its KL divergence from the original.

The original is evaluated first: ``--sources``, ``--texts``, ``--sequences`` and ``--length`` choose the text, and
``--save-reference`` keeps its tokens with the final hidden state of each. A quantized checkpoint is evaluated
against that file with its packed weights, as `load_quantized` runs them; the original's output distribution is
recomputed from the hidden states with the language-model head, which both share. That costs H numbers per token
instead of a whole vocabulary of them.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from mxmoe_steps.arguments import add_model, add_runtime, parser_for, start_torch
from mxmoe_steps.atomic import atomic_path, canonical_json, write_json
from mxmoe_steps.errors import UserError, run_cli

_ROWS = 4096  # tokens whose logits exist at one time


def score(model: Any, tokens: Any, batch: int, reference: Any | None) -> tuple[dict[str, float], Any]:
    """Metrics of ``model`` on ``tokens`` int64 [S, L], and its final hidden states [S, L, H].

    ``reference``: hidden states of the original, or None. ``nll`` and ``kl`` (original to model) are
    means in nats per predicted token; the first token of a sequence predicts, and is not predicted.
    """
    import torch

    hidden = []
    nll = kl = 0.0
    with torch.inference_mode():
        for start in range(0, len(tokens), batch):
            chunk = tokens[start : start + batch].to(model.device)
            states = model.model(input_ids=chunk, use_cache=False).last_hidden_state
            hidden.append(states.cpu())
            rows, targets = states[:, :-1].flatten(0, 1), chunk[:, 1:].flatten()
            original = None
            if reference is not None:
                original = reference[start : start + batch, :-1].to(states.device, states.dtype).flatten(0, 1)
            for low in range(0, len(rows), _ROWS):
                piece = slice(low, low + _ROWS)
                log_q = torch.log_softmax(model.lm_head(rows[piece]).float(), dim=-1)
                nll -= float(log_q.gather(-1, targets[piece].unsqueeze(-1)).double().sum())
                if original is not None:
                    log_p = torch.log_softmax(model.lm_head(original[piece]).float(), dim=-1)
                    kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    metrics = {"nll": nll / predicted, "perplexity": math.exp(nll / predicted), "kl": kl / predicted}
    return metrics, torch.cat(hidden)


def read_reference(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tokens int64 [S, L] and hidden states [S, L, H] of the original, by text."""
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(f"{path}: no such reference; evaluate the original with --save-reference first")
    stored = load_file(path)
    texts = sorted(name.removeprefix("tokens.") for name in stored if name.startswith("tokens."))
    if not texts:
        raise UserError(f"{path}: holds no tokens; it is not what evaluate --save-reference writes")
    return {text: stored[f"tokens.{text}"] for text in texts}, {text: stored[f"hidden.{text}"] for text in texts}


def load_checkpoint(args: argparse.Namespace, path: Path) -> tuple[Any, dict[str, Any]]:
    """The model, original or quantized, and what is known of it: allocation summary and size on disk."""
    from mxmoe_steps.inference.plugin import load_quantized
    from mxmoe_steps.models.loading import load_model, resolve_device

    manifest = path / "mxmoe.json"
    if manifest.is_file():
        model = load_quantized(path, str(resolve_device(args.device)), args.dtype)
        return model, json.loads(manifest.read_text(encoding="utf-8"))
    folder, model = load_model(path, args.dtype, args.device, args.trust_remote_code)
    weights_bytes = sum(file.stat().st_size for file in set(folder.files.values()))
    return model, {"allocation": None, "weights_bytes": weights_bytes}


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate one checkpoint on every text."""
    import torch
    from safetensors.torch import save_file

    from mxmoe_steps.data.reading import read_texts
    from mxmoe_steps.models.families import resolve_model

    if (args.reference is None) == (args.sources is None or args.texts is None):
        raise UserError("give either --reference, or --sources with --texts")
    start_torch(args)
    path = resolve_model(args.model)
    reference: dict[str, Any] = {}
    if args.reference is None:
        found = read_texts(args, path, args.texts, "test")
        tokens = {text: torch.from_numpy(values) for text, values in found.items()}
    else:
        tokens, reference = read_reference(args.reference)
    model, facts = load_checkpoint(args, path)
    texts, hidden = {}, {}
    for text in tokens:
        texts[text], hidden[text] = score(model, tokens[text], args.batch, reference.get(text))
        if not math.isfinite(texts[text]["nll"]):
            raise UserError(f"{path}: the loss on text {text!r} is not finite; the checkpoint is unusable")
        print(f"evaluate {text}: perplexity {texts[text]['perplexity']:.3f}", file=sys.stderr, flush=True)
    mean = {key: sum(metrics[key] for metrics in texts.values()) / len(texts) for key in ("nll", "kl")}
    overall = mean | {"perplexity": math.exp(mean["nll"])}
    if args.save_reference:
        stored = {f"tokens.{text}": values for text, values in tokens.items()}
        stored |= {f"hidden.{text}": values for text, values in hidden.items()}
        with atomic_path(args.save_reference) as temporary:
            save_file(stored, temporary, metadata={"mxmoe": canonical_json({"texts": sorted(tokens)})})
    write_json(args.out, facts | {"texts": texts, "overall": overall})


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
    parser.add_argument("--out", required=True, help="JSON file to write")
    evaluate(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
