"""Peak memory of trace, capture and evaluate on a checkpoint several times larger.

    python benchmarks/streaming.py            # writes 5 GB to the temporary folder
    python benchmarks/streaming.py --fp8      # the same with linear layers in fp8, as DeepSeek publishes it

Random weights in the shape of Qwen2-MoE, bfloat16, written layer by layer; tokenizer and text are the demo's. Each step
runs as its users run it, and the kernel's account of its anonymous memory (RssAnon: what cannot be given back, unlike
pages of the mapped checkpoint) is read every 20 ms. --limit-gb stops a step whose data exceed it.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

DEMO = Path(__file__).parents[1] / "resources" / "demo-moe"
SOURCES = json.dumps({"english": {"package": "wiki-en"}})


def write_checkpoint(folder: Path, layers: int, fp8: bool) -> int:
    """A random checkpoint with one shard per layer; returns its bytes. Memory: one layer."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    sizes = {
        "vocab_size": json.loads((DEMO / "config.json").read_text())["vocab_size"],
        "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 704, "shared_expert_intermediate_size": 2816,
        "intermediate_size": 2816, "max_position_embeddings": 2048, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    config = AutoConfig.for_model("qwen2_moe", **sizes, num_hidden_layers=layers)
    if fp8:
        config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.save_pretrained(folder)
    one = AutoConfig.for_model("qwen2_moe", **sizes, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)
    weight_map, total = {}, 0
    for layer in range(layers):
        model = AutoModelForCausalLM.from_config(one, dtype=torch.bfloat16)
        shard = {}
        for name, tensor in model.state_dict().items():
            if not name.startswith("model.layers.") and layer > 0:
                continue
            value = (
                torch.ones(tensor.shape) if "norm" in name else 0.02 * torch.randn(tensor.shape, generator=generator)
            )
            name = name.replace("model.layers.0.", f"model.layers.{layer}.")
            stem = name.removesuffix(".gate_up_proj").removesuffix(".down_proj")
            for expert, part in enumerate(value.bfloat16()) if tensor.dim() == 3 else []:
                blocks = zip(("gate", "up"), part.chunk(2), strict=True) if "gate_up" in name else [("down", part)]
                shard |= {f"{stem}.{expert}.{block}_proj.weight": one.clone() for block, one in blocks}
            if tensor.dim() != 3:
                shard[name] = value.bfloat16()
        for name in [name for name in shard if fp8 and name.endswith("proj.weight")]:
            blocks = [-(-size // 128) for size in shard[name].shape]
            shard[name] = (shard[name].float() * 1000).to(torch.float8_e4m3fn)
            shard[f"{name}_scale_inv"] = torch.full(blocks, 1e-3)
        file = f"model-{layer:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += (folder / file).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def peak_of(command: list[str], limit: Callable[[], None] | None) -> tuple[int, float]:
    """Peak RssAnon in bytes and seconds of a command."""
    start = time.monotonic()
    peak = 0
    with subprocess.Popen([sys.executable, "-m", *command], preexec_fn=limit) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *(int(line.split()[1]) << 10 for line in lines)])
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    return peak, time.monotonic() - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--fp8", action="store_true", help="publish it in fp8")
    parser.add_argument("--limit-gb", type=float, help="RLIMIT_DATA of every step")
    args = parser.parse_args()
    limit = None
    if args.limit_gb:
        size = int(args.limit_gb * 1e9)

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = write_checkpoint(folder / "model", args.layers, args.fp8)
        text = ["--sources", SOURCES, "--sequences", str(args.sequences), "--length", str(args.length), "--batch", "4"]
        common = ["--model", str(folder / "model"), "--dtype", "bfloat16", "--device", "cpu", *text]
        steps = {
            "trace": ["--texts", "english", "--out", str(folder / "trace")],
            "capture": ["--text", "english", "--out", str(folder / "capture")],
            "evaluate": ["--texts", "english", "--out", str(folder / "evaluate.json")],
        }
        print(f"checkpoint: {total / 1e9:.2f} GB, {args.layers} layers, {args.sequences * args.length} tokens")
        print("| step | peak RssAnon | checkpoint / peak | time |\n|---|---|---|---|")
        for step, options in steps.items():
            peak, seconds = peak_of([f"mxmoe_steps.{step}", *common, *options], limit)
            print(f"| {step} | {peak / 1e9:.2f} GB | {total / peak:.1f} | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
