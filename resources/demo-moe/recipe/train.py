"""Train the demo model on one GPU and measure it.

    python train.py --tokens build/tokens --out build/model

Reads what tokenizer.py wrote. Every checkpoint in --out is a complete transformers model in bfloat16.
The last one is reloaded by transformers and its logits compared with the trained model's.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from measure import measure, perplexity
from model import DemoMoe, demo_config
from optimizer import Optimizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

MIX = {"wiki": 1.2, "fr": 1.0, "es": 1.0, "en": 1.0, "docs": 0.5, "code": 0.7, "math": 1.5}  # relative epochs
WARMUP = 0.02  # of all steps; then the learning rate falls linearly to zero


def load(path: Path) -> Tensor:
    """Token ids [n] int64 of a `.bin` file."""
    return torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))


class Batches:
    """Random windows of the training text, every domain as often as ``MIX`` says."""

    def __init__(self, folder: Path, device: str, length: int, windows: int, seed: int) -> None:
        domains = {domain: load(folder / f"train.{domain}.bin") for domain in MIX}
        self.tokens = torch.cat(list(domains.values())).to(device)
        self.offsets = torch.arange(length + 1, device=device)
        weights = torch.tensor([MIX[domain] * len(ids) for domain, ids in domains.items()])
        first = torch.tensor([0, *np.cumsum([len(ids) for ids in domains.values()])[:-1]])
        room = torch.tensor([len(ids) - length for ids in domains.values()])
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(weights, windows, replacement=True, generator=generator)
        position = (torch.rand(windows, generator=generator, dtype=torch.float64) * room[chosen]).long()
        self.starts = (first[chosen] + position).to(device)
        counts = torch.bincount(chosen, minlength=len(domains)).tolist()
        self.epochs = {d: n * length / len(domains[d]) for d, n in zip(domains, counts, strict=True)}

    def __call__(self, step: int, batch: int) -> Tensor:
        """[batch, length + 1] token ids."""
        return self.tokens[self.starts[step * batch : (step + 1) * batch, None] + self.offsets]


def loss_of(model: DemoMoe, tokens: Tensor, aux: float) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats, and what is minimized: that plus ``aux`` times the load-balancing loss."""
    logits, traffic, probability = model(tokens[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    balance = probability.shape[1] * (traffic * probability).sum(dim=1).mean()
    return loss, loss + aux * balance


def save(model: DemoMoe, folder: Path) -> None:
    """Write the transformers checkpoint in shards below 13 MB."""
    model.to_transformers().save_pretrained(folder, max_shard_size="13MB")


@torch.no_grad()
def check(model: DemoMoe, folder: Path) -> float:
    """Largest difference of logits between the saved checkpoint in transformers and ``model``, float32 on the CPU."""
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, model.config.vocab_size, (2, 256), generator=torch.Generator().manual_seed(0))
    return (saved(tokens).logits - model(tokens)[0]).abs().max().item()


def train(args: argparse.Namespace, model: DemoMoe, held_out: dict[str, Tensor]) -> dict[str, object]:
    """Run all steps; returns the loss curve, how often each domain was read, and the throughput."""
    batches = Batches(args.tokens, args.device, args.length, args.steps * args.batch, args.seed)
    optimizer = Optimizer(model, args.matrix_lr, args.other_lr, args.weight_decay)
    compiled = torch.compile(loss_of) if args.compile else loss_of
    curve, losses = [], []
    untimed = min(20, args.steps // 2)  # the first steps compile
    start = time.perf_counter()
    for step in range(args.steps):
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss, objective = compiled(model, batches(step, args.batch), args.aux)
        objective.backward()
        warm = (step + 1) / (WARMUP * args.steps)
        optimizer.step(min(1.0, warm, (args.steps - step) / (args.steps * (1 - WARMUP))))
        losses.append(loss.detach())
        if step == untimed:
            losses[-1].item()
            timed = time.perf_counter()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            with torch.autocast(args.device, dtype=torch.bfloat16):
                values = {domain: round(perplexity(model, ids[:65536])[0], 3) for domain, ids in held_out.items()}
            mean = torch.stack(losses).mean().item()
            seconds = round(time.perf_counter() - start, 1)
            curve.append({"step": step + 1, "seconds": seconds, "loss": round(mean, 4), "held_out": values})
            print(json.dumps(curve[-1]), flush=True)
            losses = []
        if (step + 1) % args.save_every == 0:
            save(model, args.out)
    seconds = time.perf_counter() - timed
    tokens = args.batch * args.length
    return {
        "curve": curve,
        "epochs": batches.epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": args.steps * tokens,
        "tokens_per_second": (args.steps - 1 - untimed) * tokens / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure the demo model.")
    parser.add_argument("--tokens", type=Path, required=True, help="folder written by tokenizer.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and training.json")
    parser.add_argument("--steps", type=int, default=6000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=64, help="sequences per step")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--matrix-lr", type=float, default=8e-3, help="Muon learning rate")
    parser.add_argument("--other-lr", type=float, default=3e-3, help="AdamW learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.2, help="of the matrices")
    parser.add_argument("--aux", type=float, default=0.001, help="load-balancing coefficient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--log-every", type=int, default=250, help="steps between held-out perplexities")
    parser.add_argument("--save-every", type=int, default=3000, help="steps between checkpoints")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run without torch.compile")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    vocab = len(json.loads((args.tokens / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    model = DemoMoe(demo_config(vocab)).to(args.device)
    sizes = json.loads((args.tokens / "bytes.json").read_text())
    held_out = {path.name.split(".")[1]: load(path).to(args.device) for path in sorted(args.tokens.glob("test.*.bin"))}
    report = train(args, model, held_out)
    save(model, args.out)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # measure what was saved
    report |= measure(model, held_out, {domain: sizes[f"test.{domain}"] for domain in held_out})
    report["transformers_max_logit_difference"] = check(model.cpu(), args.out)
    report["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    report["settings"] = {key: value for key, value in vars(args).items() if isinstance(value, int | float)}
    (args.out / "training.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    print(json.dumps({d: {k: v for k, v in r.items() if "perplexity" in k} for d, r in report["domains"].items()}))
    print(f"{report['tokens_per_second']:,.0f} tokens/s, logits {report['transformers_max_logit_difference']:.2e}")


if __name__ == "__main__":
    main()
