"""evaluate: perplexity of a checkpoint on held-out text, and its KL divergence from the original.

A quantized checkpoint is evaluated with its packed weights, as `load_quantized` runs them. The
original is evaluated first with ``--save-hidden``: the final hidden states of every token are kept,
from which the output distribution is recomputed with the language-model head that both share. That
costs H numbers per token instead of a whole vocabulary of them.
"""

import argparse
import json
import math
import sys
from typing import Any

from mxmoe_steps.arguments import add_model, add_runtime, add_text, parser_for, start_torch
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
            chunk = torch.from_numpy(tokens[start : start + batch]).to(model.device)
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


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate one checkpoint on every text."""
    from safetensors.torch import load_file, save_file

    from mxmoe_steps.data.parsing import parse_sources
    from mxmoe_steps.data.tokens import load_sequences
    from mxmoe_steps.inference.plugin import load_quantized
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.loading import load_model, load_tokenizer, resolve_device

    start_torch(args)
    path = resolve_model(args.model)
    manifest = path / "mxmoe.json"
    sources = parse_sources(args.sources)
    tokenizer = load_tokenizer(path, args.trust_remote_code)
    tokens = {
        text: load_sequences(sources, text, "test", tokenizer, args.length, args.sequences, args.seed)
        for text in args.texts
    }
    reference = load_file(args.reference) if args.reference else {}
    for text in args.texts if args.reference else []:
        if text not in reference or reference[text].shape[:2] != tokens[text].shape:
            raise UserError(f"{args.reference}: was saved for other texts or lengths; evaluate the original again")
    if manifest.is_file():
        model = load_quantized(path, str(resolve_device(args.device)), args.dtype)
        facts = json.loads(manifest.read_text(encoding="utf-8"))
    else:
        folder, model = load_model(path, args.dtype, args.device, args.trust_remote_code)
        weights = sum(file.stat().st_size for file in set(folder.files.values()))
        facts = {"allocation": None, "weights_bytes": weights}
    texts, hidden = {}, {}
    for text in args.texts:
        texts[text], hidden[text] = score(model, tokens[text], args.batch, reference.get(text))
        if not math.isfinite(texts[text]["nll"]):
            raise UserError(f"{path}: the loss on text {text!r} is not finite; the checkpoint is unusable")
        print(f"evaluate {text}: perplexity {texts[text]['perplexity']:.3f}", file=sys.stderr, flush=True)
    mean = {key: sum(metrics[key] for metrics in texts.values()) / len(texts) for key in ("nll", "kl")}
    overall = mean | {"perplexity": math.exp(mean["nll"])}
    if args.save_hidden:
        with atomic_path(args.save_hidden) as temporary:
            save_file(hidden, temporary, metadata={"mxmoe": canonical_json({"texts": sorted(hidden)})})
    write_json(args.out, facts | {"texts": texts, "overall": overall})


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    add_model(parser)
    add_text(parser, several=True)
    add_runtime(parser)
    parser.add_argument("--reference", help="hidden states of the original that --save-hidden wrote")
    parser.add_argument("--save-hidden", metavar="FILE", help="keep the final hidden states (for the original)")
    parser.add_argument("--out", required=True, help="JSON file to write")
    evaluate(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
