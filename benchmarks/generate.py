"""Time of text generation as a user calls it, quantized models beside the original, in one process.

    python benchmarks/generate.py --build                # compile the kernels; needs no GPU
    python benchmarks/generate.py --out generate.json    # measure; needs an H100 with 80 GB
    python benchmarks/generate.py --show generate.json   # the tables again

The models have the shape of Qwen1.5-MoE-A2.7B and random weights; the packed checkpoints are written here first. So
that all of them do the same work, the router's logits are replaced by fixed noise, other noise in every layer. Runs:
``original``, transformers' own experts in bfloat16; ``w4a16``; ``hot``, the shared expert and every fourth expert in
w8a8_fp8 and the others in w4a16; ``w8a8_fp8``.

host       microseconds that the host needs to launch a MoE layer in a decode step
generate   milliseconds a step of model.generate(tokens)
static     the same with cache_implementation="static", where transformers compiles the step
deferred   as static, and measured with it only, where the original too looks for the end of a text one step late, as
           our models do (`mxmoe_steps.inference.deferred_stop`)
graph      the eager step with a static cache, captured in a CUDA graph by hand and replayed
prefill    milliseconds of a forward pass over prompts
batching   tokens a second of model.generate_batch for requests of mixed lengths
profile    kernels of a compiled step of one sequence, w4a16

Runs of a cell take turns in rounds; a figure is the median over rounds of the median step, or of the call. The host
decides some of them: ``--rounds`` more of them, and the log has every round.
"""

import argparse
import collections
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mxmoe_steps.timing.throughput import decode_ms, forget_compiled, prefill_ms, wall_ms

SHAPE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
RUNS = ("original", "w4a16", "hot", "w8a8_fp8")
PARTS = ("host", "generate", "static", "deferred", "graph", "prefill", "batching", "profile")
BATCHES = (1, 16, 64)
PROMPT, NEW = 64, 32  # tokens
PREFILLS = ((1, 512), (1, 2048), (4, 2048))  # sequences, tokens
MOST_TOKENS = 8192
REQUESTS, LONGEST = 64, 512

Cells = dict[str, dict[str, float]]  # cell -> run -> figure


def schemes_of(run: str, expert: int) -> tuple[str, str, str]:
    """Schemes of gate, up and down; the shared expert is -1."""
    if run == "hot":
        run = "w8a8_fp8" if expert == -1 or expert % 4 == 0 else "w4a16"
    return run, run, run


def write_checkpoint(
    run: str, folder: Path, layers: int, schemes: Callable[[int], tuple[str, str, str]] | None = None
) -> None:
    """A packed checkpoint with random codes: slices of one pool, so that it takes seconds.

    ``schemes`` of an expert's blocks, instead of the run's.
    """
    from mxmoe_steps.models.families import EXPERTS_IMPLEMENTATION
    from mxmoe_steps.packing import packed_width
    from mxmoe_steps.quantize import quantization_config
    from mxmoe_steps.schemes import BLOCKS, SHARED, parse_scheme

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**25, generator=generator)
    normal, fp8 = (noise * 0.02).bfloat16(), (noise * 60).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.randint(0, 256, (2**25,), generator=generator, dtype=torch.uint8)

    def part(pool: torch.Tensor, *shape: int) -> torch.Tensor:
        count = shape[0] * shape[1]
        if count > len(pool):
            return pool.repeat(-(-count // len(pool)))[:count].reshape(shape)
        first = int(torch.randint(0, len(pool) - count, (), generator=generator))
        return pool[first : first + count].reshape(shape).clone()

    hidden, vocabulary = SHAPE["hidden_size"], SHAPE["vocab_size"]
    files: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor], name: str) -> None:
        save_file(tensors, folder / name)
        files.update(dict.fromkeys(tensors, name))

    ends = {f"{name}.weight": part(normal, vocabulary, hidden) for name in ("model.embed_tokens", "lm_head")}
    save(ends | {"model.norm.weight": torch.ones(hidden).bfloat16()}, "ends.safetensors")
    assignment = {}
    for layer in range(layers):
        base = f"model.layers.{layer}"
        tensors = {f"{base}.self_attn.{name}_proj.weight": part(normal, hidden, hidden) for name in "qkvo"}
        tensors |= {f"{base}.self_attn.{name}_proj.bias": torch.zeros(hidden).bfloat16() for name in "qkv"}
        tensors |= {
            f"{base}.{name}.weight": torch.ones(hidden).bfloat16()
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        tensors |= {f"{base}.mlp.gate.weight": part(normal, SHAPE["num_experts"], hidden)}
        tensors |= {f"{base}.mlp.shared_expert_gate.weight": part(normal, 1, hidden)}
        for expert in (*range(SHAPE["num_experts"]), SHARED):
            stated = schemes_of(run, expert) if schemes is None else schemes(expert)
            names = tuple(parse_scheme(name).name for name in stated)
            assignment[layer, expert] = names
            inner = SHAPE["shared_expert_intermediate_size" if expert == SHARED else "moe_intermediate_size"]
            module = f"{base}.mlp." + ("shared_expert" if expert == SHARED else f"experts.{expert}")
            for block, name in zip(BLOCKS, names, strict=True):
                n, k = (hidden, inner) if block == "down" else (inner, hidden)
                scheme, prefix = parse_scheme(name), f"{module}.{block}_proj"
                groups = -(-k // scheme.group_size(k))
                float_codes = scheme.fp8 and scheme.weight_bits == 8
                spread = 0.02 / 60 if float_codes else 0.02 / 2 ** (scheme.weight_bits - 2)
                width = k if float_codes else packed_width(k, scheme.weight_bits)
                tensors[f"{prefix}.qweight"] = part(fp8 if float_codes else codes, n, width)
                tensors[f"{prefix}.scales"] = torch.full((n, groups), spread).bfloat16()
                if not scheme.symmetric:
                    middle = (2**scheme.weight_bits - 1) / 2
                    tensors[f"{prefix}.zeros"] = torch.full((n, groups), middle).bfloat16()
        save(tensors, f"layer-{layer:02d}.safetensors")
    config = SHAPE | {"num_hidden_layers": layers, "experts_implementation": EXPERTS_IMPLEMENTATION}
    config |= {"quantization_config": quantization_config(assignment, "rtn")}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


class FixedRouting(torch.nn.Module):
    """A router of transformers whose logits are fixed noise, by token; it still computes its own."""

    def __init__(self, router: Any, layer: int) -> None:
        super().__init__()
        self.weight, self.top_k = router.weight, router.top_k
        generator = torch.Generator().manual_seed(layer)
        noise = torch.randn(MOST_TOKENS, len(router.weight), generator=generator)
        self.register_buffer("noise", noise.to(router.weight), persistent=False)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `Qwen2MoeTopKRouter`."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        logits = torch.nn.functional.linear(tokens, self.weight) * 0 + self.noise[: len(tokens)]
        weights, expert_ids = torch.topk(logits.softmax(-1, dtype=torch.float32), self.top_k, dim=-1)
        return logits, weights.to(logits.dtype), expert_ids


def load(run: str, folder: Path, layers: int) -> Any:
    """The model of a run on the GPU, its routing fixed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import mxmoe_steps

    started = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if run == "original":
        config = AutoConfig.for_model(**(SHAPE | {"num_hidden_layers": layers}))
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    else:
        path = folder / run
        if not path.is_dir():
            path.mkdir()
            write_checkpoint(run, path, layers)
            print(f"{run}: checkpoint written in {time.perf_counter() - started:.1f} s", flush=True)
        started = time.perf_counter()
        model = mxmoe_steps.load_quantized(str(path), "cuda", torch.bfloat16)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate = FixedRouting(layer.mlp.gate, number)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    allocated, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    seconds = time.perf_counter() - started
    print(f"{run}: {seconds:.1f} s, {allocated / 1e9:.2f} GB, {peak / 1e9:.2f} at the peak", flush=True)
    return model


def prompts(batch: int, tokens: int = PROMPT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, SHAPE["vocab_size"], (batch, tokens), generator=generator).cuda()


def generate(model: Any, batch: int, **options: Any) -> float:
    """Median milliseconds from step to step."""
    return decode_ms(model, prompts(batch), NEW, **options)


@contextmanager
def deferred_stop() -> Iterator[None]:
    """Lets ``generate`` of all models look for the end of a text one step late."""
    from transformers.generation.utils import DeferredStopCheck

    supported = DeferredStopCheck.is_supported
    DeferredStopCheck.is_supported = staticmethod(lambda *_, **__: True)
    try:
        yield
    finally:
        DeferredStopCheck.is_supported = staticmethod(supported)


def captured(model: Any, batch: int) -> Callable[[], float]:
    """Captures a step in a CUDA graph; returns what times it, in milliseconds."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    token = prompts(batch, 1)
    with torch.no_grad():
        model(prompts(batch), past_key_values=cache)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                model(token, past_key_values=cache)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = model(token, past_key_values=cache).logits

    def run() -> float:
        assert len(kept) == len(token)  # what the graph reads and writes stays allocated
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)
        times = []
        for _ in range(NEW - 4):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    return run


def prefill(model: Any, sequences: int, tokens: int) -> float:
    """Milliseconds."""
    return prefill_ms(model, prompts(sequences, tokens))


def host(model: Any, batch: int, calls: int = 20) -> float:
    """Microseconds of the host for a call of one MoE module, while the GPU's queue has room for more."""
    moe = model.model.layers[0].mlp
    hidden = torch.randn(batch, 1, SHAPE["hidden_size"], device="cuda").bfloat16()

    times = []
    with torch.no_grad(), model._optimize_model_for_decode():  # the original's experts are others in a prefill
        for _ in range(10):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                moe(hidden)
            times.append(1e6 * (time.perf_counter() - start) / calls)
    return statistics.median(times)


def batching(model: Any) -> float:
    """Tokens a second of continuous batching."""
    from transformers import GenerationConfig

    shuffle = random.Random(0)
    lengths = [shuffle.randint(16, LONGEST) for _ in range(REQUESTS)]
    requests = [prompts(1, length)[0].tolist() for length in lengths]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    done: dict[str, Any] = {}

    def run() -> None:
        done.update(model.generate_batch(inputs=requests, generation_config=settings, progress_bar=False))

    milliseconds = wall_ms(run)
    made = sum(len(one.generated_tokens) for one in done.values())
    assert made == REQUESTS * NEW, f"{made} tokens"
    return made / milliseconds * 1e3


def profile(model: Any) -> dict[str, float]:
    """Microseconds a step of every kernel of the compiled step for one sequence."""
    from torch.profiler import ProfilerActivity, profile

    options = {"cache_implementation": "static"}
    generate(model, 1, **options)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        generate(model, 1, **options)
    counts: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for event in profiler.events():
        counts[event.name] += event.device_time_total
        calls[event.name] += 1
    return {
        f"{name[:90]} x{calls[name] / (NEW - 1):.0f}": round(us / (NEW - 1), 1) for name, us in counts.most_common(30)
    }


def measure(
    parts: list[str],
    models: dict[str, Any],
    batches: list[int],
    skipped: set[tuple[str, ...]],
    count: int,
    save: Callable[[str, str, dict[str, float]], None],
) -> None:
    """Every part, cell by cell, but for ``skipped``, (part, batch, run)."""

    def rounds(part: str, cell: str, runs: dict[str, Callable[[], float]]) -> None:
        found: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(count + 1):  # the first warms up
            for name, run in runs.items():
                try:
                    figure = run()
                except Exception as error:
                    print(f"{part} {cell} {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    figure = float("nan")
                if number:
                    found[name].append(figure)
        for name, figures in found.items():
            print(f"{part} {cell} {name}:", *(f"{figure:.2f}" for figure in figures), flush=True)
        save(part, cell, {name: statistics.median(figures) for name, figures in found.items()})

    def each(run: Callable[..., float], *arguments: Any, **options: Any) -> dict[str, Callable[[], float]]:
        return {name: lambda model=model: run(model, *arguments, **options) for name, model in models.items()}

    if "host" in parts:
        for batch in batches:
            rounds("host", f"{batch}", each(host, batch))
    if "prefill" in parts:
        for sequences, tokens in PREFILLS:
            rounds("prefill", f"{sequences} x {tokens}", each(prefill, sequences, tokens))
    for batch in batches:
        if "graph" in parts:
            rounds("graph", f"{batch}", {name: captured(model, batch) for name, model in models.items()})
            gc.collect()
        if "static" in parts:
            forget_compiled(models)
            runs = {
                name: run
                for name, run in each(generate, batch, cache_implementation="static").items()
                if ("static", f"{batch}", name) not in skipped
            }
            for name, run in runs.items():
                print(f"static {batch} {name}: first call {wall_ms(run) / 1e3:.0f} s", flush=True)
            rounds("static", f"{batch}", runs)
            if "deferred" in parts:
                with deferred_stop():
                    rounds("deferred", f"{batch}", runs)
        if "profile" in parts and batch == 1:
            save("profile", "w4a16", profile(models["w4a16"]))
    if "batching" in parts:
        rounds("batching", f"{REQUESTS} requests", each(batching))
    if "generate" in parts:  # the host decides, and takes longest
        for batch in batches:
            rounds("generate", f"{batch}", each(generate, batch))


def show(results: dict[str, Cells]) -> None:
    """Tables; steps also as tokens a second and as a multiple of the original's fastest."""
    for part, cells in results.items():
        for cell, figures in cells.items():
            if part == "profile":
                print(f"profile {cell}: {sum(figures.values()):.0f} us in all")
                print("".join(f"  {us:8.1f}  {name}\n" for name, us in figures.items()), end="")
            else:
                print(f"{part:<9} {cell:<12}" + "".join(f"  {run} {value:9.2f}" for run, value in figures.items()))
    for batch in results.get("static", {}):
        fastest = min(
            results[part][batch]["original"]
            for part in ("static", "graph")
            if "original" in results.get(part, {}).get(batch, {})
        )
        ratios = {run: value / fastest for run, value in results["static"][batch].items()}
        print(
            f"static / fastest original, {batch}: " + "  ".join(f"{run} {ratio:.2f}" for run, ratio in ratios.items())
        )


def build_kernels() -> None:
    """Compile what the runs load."""
    from mxmoe_steps.kernels.architectures import DEFAULT
    from mxmoe_steps.kernels.build import TokenKernel, build
    from mxmoe_steps.kernels.plan import plan_layer
    from mxmoe_steps.schemes import SHARED, parse_scheme

    for run in RUNS[1:]:
        experts = (*range(SHAPE["num_experts"]), SHARED)
        schemes = {e: tuple(parse_scheme(name) for name in schemes_of(run, e)) for e in experts}
        plan = plan_layer(
            schemes,  # type: ignore[arg-type]
            SHAPE["hidden_size"],
            SHAPE["moe_intermediate_size"],
            SHAPE["shared_expert_intermediate_size"],
        )
        for config in {config for launch in (plan.gate_up, plan.down) for config in launch.kernels(DEFAULT).values()}:
            print(build(config), config.name, flush=True)
    for name in DEFAULT.token_kernels:
        print(build(TokenKernel(name)), name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="compile the kernels and stop")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print an earlier --out and stop")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=RUNS)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--skip", nargs="*", default=[], metavar="PART:BATCH:RUN", help="e.g. static:64:original")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept, by default nowhere")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.build:
        build_kernels()
        return
    if arguments.show:
        show(json.loads(arguments.show.read_text()))
        return
    results: dict[str, Cells] = {}

    def save(part: str, cell: str, figures: dict[str, float]) -> None:
        results.setdefault(part, {})[cell] = figures
        if part != "profile":
            print(part, cell, {run: round(value, 3) for run, value in figures.items()}, flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1))

    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        models = {run: load(run, folder, arguments.layers) for run in arguments.runs}
        skipped = {tuple(text.split(":")) for text in arguments.skip}
        measure(arguments.parts, models, arguments.batches, skipped, arguments.rounds, save)
    show(results)


if __name__ == "__main__":
    main()
