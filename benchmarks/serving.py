"""vLLM with packed checkpoints beside vLLM's own precisions, on one GPU.

    python benchmarks/generate.py --build               # compile the kernels; needs no GPU
    python benchmarks/serving.py --build                # those of the mixtures
    python benchmarks/serving.py --out serving.json     # measure; needs an H100 with 80 GB, vLLM and this package
    python benchmarks/serving.py --show serving.json    # the tables again

All runs have the shape of Qwen1.5-MoE-A2.7B and do the same work: every layer's router logits are replaced by fixed
noise. vLLM's runs have random weights of vLLM's making and, as ours, 16-bit attention, head and router:

bf16      as published
W4A16     4 bits, groups of 128, symmetric (compressed-tensors; Marlin on Hopper)
FP8       e4m3 weights, one scale a channel, e4m3 activations, one scale a token (compressed-tensors)

Ours: w4a16, w8a8_fp8, ``hot`` of generate.py, and the mixtures ``4.25`` and ``5`` of mixed_allocations.json for 64
tokens.

decode    milliseconds of the GPU for the CUDA graph of a step, replayed, and of a step of LLM.generate
prefill   milliseconds to the first token of a prompt, one request at a time
http      tokens a second of the HTTP server for concurrent requests of 128 tokens that ask for 128

A run is one process. Runs take turns in rounds; a figure is the median over rounds.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from generate import SHAPE, schemes_of, write_checkpoint

THEIRS = ("bf16", "W4A16", "FP8")
MIXTURES = ("4.25", "5")
OURS = ("w4a16", "w8a8_fp8", "hot", *MIXTURES)
PARTS = ("decode", "prefill", "http")
BATCHES = (1, 4, 8, 16, 32, 64, 128, 256)
PREFILLS = (512, 2048, 8000)  # tokens; a model of 8192 gives one more
CONCURRENT = (64, 256)
PROMPT, NEW, SKIPPED = 64, 128, 8  # tokens of a decode; steps before it counts
MOST_TOKENS = 8192
PORT = 8817
SERVER = "MXMOE_BENCHMARK_SERVER"  # set in the server and its processes
REPLAYS = 20

Figures = dict[str, float]  # cell -> figure

_SIXTEEN_BITS = ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]


def compressed(bits: int) -> dict[str, Any]:
    """The ``quantization_config`` of vLLM's own precisions: int4 weights in groups, or e4m3 weights and activations."""
    weights = {"num_bits": bits, "symmetric": True, "dynamic": False, "observer": "minmax"}
    if bits == 4:
        group = {"weights": weights | {"type": "int", "strategy": "group", "group_size": 128}}
    else:
        tokens = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
        group = {"weights": weights | {"type": "float", "strategy": "channel"}, "input_activations": tokens}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if bits == 4 else "float-quantized",
        "quantization_status": "compressed",
        "ignore": _SIXTEEN_BITS,
        "config_groups": {"group_0": {"targets": ["Linear"]} | group},
    }


def scheme_of(run: str) -> Any:
    """Expert -> schemes of its blocks, for a run of ours."""
    if run not in MIXTURES:
        return lambda expert: schemes_of(run, expert)
    from mixed_allocations import FILE, read_allocations

    solved = read_allocations(FILE, [run])
    (found,) = (one for one in solved if (one.case.name, one.tokens, one.name) == ("qwen1.5-moe+shared", 64, run))
    return lambda expert: tuple(scheme.name for scheme in found.schemes[3 * (expert + 1) :][:3])


def prepare(run: str, folder: Path, layers: int) -> Path:
    """The model's folder: a packed checkpoint, or no more than a configuration."""
    path = folder / run
    if (path / "config.json").is_file():
        return path
    path.mkdir(parents=True)
    if run in OURS:
        write_checkpoint(run, path, layers, scheme_of(run))
        return path
    quantization = {} if run == "bf16" else {"quantization_config": compressed(4 if run == "W4A16" else 8)}
    (path / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers} | quantization))
    return path


def engine_options(run: str, path: Path, batches: list[int]) -> dict[str, Any]:
    """What decides the engine, the same for all runs but for where weights come from."""
    return {
        "model": str(path),
        "load_format": "auto" if run in OURS else "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": MOST_TOKENS,
        "max_num_seqs": max(batches),
        "max_num_batched_tokens": MOST_TOKENS,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.85,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": batches},
    }


def fix_routing() -> None:
    """Replace the router logits of every layer by noise of its own, by the place of a token in the batch."""
    import torch
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    forward = MoERunner.forward
    noise: dict[str, torch.Tensor] = {}

    def with_noise(self: Any, hidden_states: Any, router_logits: Any, *rest: Any, **options: Any) -> Any:
        name = self.layer_name
        if name not in noise:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(2 * MOST_TOKENS, router_logits.shape[1], generator=generator)
            noise[name] = values.to(router_logits)
        return forward(self, hidden_states, noise[name][: len(router_logits)], *rest, **options)

    MoERunner.forward = with_noise


class Graphs:
    """Remembers the CUDA graph that was replayed last."""

    def __init__(self) -> None:
        import torch

        self.last: Any = None
        self.replay = replay = torch.cuda.CUDAGraph.replay

        def remember(graph: Any) -> None:
            self.last = graph
            replay(graph)

        torch.cuda.CUDAGraph.replay = remember

    def milliseconds(self) -> float:
        """Of the GPU for the last graph; NaN if there was none."""
        import torch

        if self.last is None:
            return float("nan")
        times = []
        for _ in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(REPLAYS):
                self.replay(self.last)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / REPLAYS)
        return statistics.median(times)


def fill(model: Any) -> None:
    """Plausible numbers in place of vLLM's dummy weights, which are the same in every parameter."""
    import torch

    generator = torch.Generator(next(model.parameters()).device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scale" in name:
                parameter.fill_(0.005)
            elif not parameter.is_floating_point():
                parameter.data.view(torch.uint8).random_(0, 256, generator=generator)
            elif parameter.dim() > 1 and parameter.element_size() > 1:
                for part in parameter.data.view(-1).split(2**26):
                    part.normal_(0, 0.02, generator=generator)


def offline(run: str, path: Path, parts: list[str], batches: list[int]) -> Figures:
    """Decode and prefill in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    graphs = Graphs()
    fix_routing()
    started = time.perf_counter()
    llm = LLM(**engine_options(run, path, batches))
    figures = {"engine s": time.perf_counter() - started, "GB": torch.cuda.memory_allocated() / 1e9}
    if run in THEIRS:
        llm.apply_model(fill)
    shuffle = random.Random(0)

    def seconds(sequences: int, tokens: int, new: int) -> float:
        prompts = [
            TokensPrompt(prompt_token_ids=[shuffle.randrange(SHAPE["vocab_size"]) for _ in range(tokens)])
            for _ in range(sequences)
        ]
        settings = SamplingParams(max_tokens=new, ignore_eos=True, temperature=1.0, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, settings, use_tqdm=False)
        return time.perf_counter() - start

    if "decode" in parts:
        for batch in batches:
            graphs.last = None
            seconds(batch, PROMPT, SKIPPED)
            short, long = (
                statistics.median(seconds(batch, PROMPT, new) for _ in range(3)) for new in (SKIPPED, SKIPPED + NEW)
            )
            figures |= {f"graph {batch}": graphs.milliseconds(), f"step {batch}": (long - short) / NEW * 1e3}
    if "prefill" in parts:
        for tokens in PREFILLS:
            seconds(1, tokens, 1)
            figures[f"first token {tokens}"] = statistics.median(seconds(1, tokens, 1) for _ in range(5)) * 1e3
    return figures


def serve(run: str, path: Path) -> None:
    """vLLM's HTTP server with fixed routing."""
    os.environ[SERVER] = "1"
    import runpy

    fix_routing()
    options = engine_options(run, path, [*BATCHES])
    command = ["--port", str(PORT), "--host", "127.0.0.1", "--model", options.pop("model"), "--skip-tokenizer-init"]
    del options["skip_tokenizer_init"], options["enable_prefix_caching"]
    for name, value in options.items():
        command += ["--" + name.replace("_", "-"), json.dumps(value) if isinstance(value, dict) else str(value)]
    sys.argv = ["vllm", *command, "--no-enable-prefix-caching", "--disable-log-stats"]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def http(run: str, path: Path, layers: int) -> Figures:
    """Tokens a second through the server."""
    command = [sys.executable, __file__, "--serve", run, "--folder", str(path.parent), "--layers", str(layers)]
    server = subprocess.Popen(command, stdout=sys.stderr)
    shuffle = random.Random(0)

    def ask(new: int) -> int:
        prompt = [shuffle.randrange(SHAPE["vocab_size"]) for _ in range(128)]
        content = {"model": str(path), "prompt": prompt, "max_tokens": new, "ignore_eos": True, "temperature": 1.0}
        content |= {"detokenize": False}
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORT}/v1/completions",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["usage"]["completion_tokens"]

    try:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(f"{run}: the server ended with {server.returncode}")
            try:
                ask(1)
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        figures = {}
        for count in CONCURRENT:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(ask, [8] * count))
                start = time.perf_counter()
                made = sum(pool.map(ask, [128] * (4 * count)))
                figures[f"tokens/s {count}"] = made / (time.perf_counter() - start)
        return figures
    finally:
        server.terminate()
        server.wait(60)


def build_kernels() -> None:
    """Compile those of the mixtures."""
    from mxmoe_steps.kernels.architectures import DEFAULT
    from mxmoe_steps.kernels.build import build
    from mxmoe_steps.kernels.plan import plan_layer
    from mxmoe_steps.schemes import SHARED, parse_scheme

    sizes = [SHAPE[f"{key}_size"] for key in ("hidden", "moe_intermediate", "shared_expert_intermediate")]
    for run in MIXTURES:
        of = scheme_of(run)
        experts = {e: tuple(map(parse_scheme, of(e))) for e in (*range(SHAPE["num_experts"]), SHARED)}
        plan = plan_layer(experts, *sizes)  # type: ignore[arg-type]
        for launch in (plan.gate_up, plan.down):
            for config in launch.kernels(DEFAULT).values():
                print(build(config), config.name, flush=True)


def show(results: dict[str, list[Figures]]) -> None:
    """A row a figure, a column a run."""
    medians = {
        run: {cell: statistics.median(one[cell] for one in rounds if cell in one) for cell in rounds[0]}
        for run, rounds in results.items()
    }
    print(f"{'':<18}" + "".join(f"{run:>10}" for run in medians))
    for cell in dict.fromkeys(cell for figures in medians.values() for cell in figures):
        print(f"{cell:<18}" + "".join(f"{figures.get(cell, float('nan')):>10.2f}" for figures in medians.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="compile the mixtures' kernels and stop")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print an earlier --out and stop")
    parser.add_argument("--runs", nargs="*", default=[*THEIRS, *OURS], choices=[*THEIRS, *OURS])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept, by default nowhere")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own does
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        build_kernels()
        return
    if arguments.show:
        show(json.loads(arguments.show.read_text()))
        return
    if arguments.serve:
        serve(arguments.serve, arguments.folder / arguments.serve)
        return
    if arguments.one:
        path = arguments.folder / arguments.one
        arguments.out.write_text(json.dumps(offline(arguments.one, path, arguments.parts, arguments.batches)))
        return
    results: dict[str, list[Figures]] = {run: [] for run in arguments.runs}
    with tempfile.TemporaryDirectory() as temporary:
        folder, one = arguments.folder or Path(temporary), Path(temporary) / "one.json"
        for _ in range(arguments.rounds):
            for run in arguments.runs:
                path = prepare(run, folder, arguments.layers)
                figures: Figures = {}
                if {"decode", "prefill"} & set(arguments.parts):
                    command = [sys.executable, __file__, "--one", run, "--folder", folder, "--out", one]
                    command += ["--parts", *arguments.parts, "--batches", *map(str, arguments.batches)]
                    if subprocess.run(command, stdout=sys.stderr, check=False).returncode == 0:
                        figures |= json.loads(one.read_text())
                if "http" in arguments.parts:
                    figures |= http(run, path, arguments.layers)
                results[run].append(figures)
                print(run, {cell: round(figure, 3) for cell, figure in figures.items()}, flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(results, indent=1))
    show(results)


if __name__ == "__mp_main__" and SERVER in os.environ:  # a process that the server has started
    fix_routing()

if __name__ == "__main__":
    main()
