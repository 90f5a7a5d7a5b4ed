"""vLLM with packed checkpoints beside vLLM's own precisions, on one GPU.

    python benchmarks/generate.py --build               # compile the kernels; needs no GPU
    python benchmarks/serving.py --build                # those of the mixtures
    python benchmarks/serving.py --out serving.json     # measure; needs an H100 with 80 GB, vLLM and this package
    python benchmarks/serving.py --show serving.json    # the tables again, of several files together

All runs have the shape of Qwen1.5-MoE-A2.7B, random weights, and the same work to do: every layer's router logits are
replaced by fixed noise. Attention, head and router have 16 bits. vLLM's own:

bf16      as published
W4A16     4 bits, groups of 128, symmetric (compressed-tensors; Marlin on Hopper)
FP8       e4m3 weights, one scale a channel, e4m3 activations, one scale a token (compressed-tensors)

Ours: w4a16, w8a8_fp8, ``hot`` of generate.py, and the mixtures ``4.25`` and ``5`` of mixed_allocations.json for 64
tokens.

decode    milliseconds of the GPU for the CUDA graph of a step, replayed, and of a step of LLM.generate
prefill   milliseconds to the first token of a prompt, one request at a time
load      seconds until a checkpoint's weights are in place, and those that reading its bytes onto the GPU takes alone
http      tokens a second of the HTTP server for concurrent requests of 128 tokens that ask for 128

A run is one process, and one more for http. Runs take turns in rounds; a figure is the median over rounds. It need not
be one call: ``--parts``, ``--runs`` and ``--batches`` choose, ``--timeout`` ends what takes too long, ``--out`` adds to
what the file has. Without parts, the checkpoints are written to ``--folder`` and no more.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from generate import SHAPE, schemes_of, write_checkpoint

from mxmoe_steps.atomic import atomic_path

THEIRS = ("bf16", "W4A16", "FP8")
MIXTURES = ("4.25", "5")
OURS = ("w4a16", "w8a8_fp8", "hot", *MIXTURES)
PARTS = ("load", "decode", "prefill", "http")
BATCHES = (1, 4, 8, 16, 32, 64, 128, 256)
PREFILLS = (512, 2048, 8000)  # tokens; a model of 8192 gives one more
CONCURRENT = (64, 256)
PROMPT, NEW, SKIPPED = 64, 128, 8  # tokens of a decode; steps before it counts
MOST_TOKENS = 8192  # of a sequence
MOST_STEP = max(BATCHES) * PROMPT  # tokens: all sequences begin in one step, and end in one
PORT = 8817
SERVER = "MXMOE_BENCHMARK_SERVER"  # set in the server and its processes
REPLAYS = 20

Figures = dict[str, float]  # cell -> figure
Results = dict[str, list[Figures]]  # run -> rounds

_SIXTEEN_BITS = ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]


def write(file: Path, figures: Any) -> None:
    """As JSON, in their order."""
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(figures, indent=1))


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


def engine_options(run: str, path: Path, batches: list[int], attention: str | None) -> dict[str, Any]:
    """What decides the engine, the same for all runs but for where weights come from."""
    return ({} if attention is None else {"attention_backend": attention}) | {
        "model": str(path),
        "load_format": "auto" if run in OURS else "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": MOST_TOKENS,
        "max_num_seqs": max(batches),
        "max_num_batched_tokens": MOST_STEP,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.85,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": batches},
    }


def prepare_engine() -> None:
    """What every process with an engine of this benchmark changes in vLLM."""
    fix_routing()
    fill_weights()


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
            values = torch.randn(MOST_STEP, router_logits.shape[1], generator=generator)
            noise[name] = values.to(router_logits)
        return forward(self, hidden_states, noise[name][: len(router_logits)], *rest, **options)

    MoERunner.forward = with_noise


class Graphs:
    """Knows which CUDA graphs were replayed.

    The graph of a batch is the slowest of them: where prompts fill more than a step, some sequences begin and end later
    than others, in graphs of smaller batches.
    """

    def __init__(self) -> None:
        import torch

        self.replayed: set[Any] = set()
        self.replay = replay = torch.cuda.CUDAGraph.replay

        def note(graph: Any) -> None:
            self.replayed.add(graph)
            replay(graph)

        torch.cuda.CUDAGraph.replay = note

    def milliseconds(self) -> float:
        """Of the GPU for the graph of the batch since the last clear; NaN if there was none."""
        return max(map(self.milliseconds_of, self.replayed), default=float("nan"))

    def milliseconds_of(self, graph: Any) -> float:
        """Of the GPU for one graph."""
        import torch

        times = []
        for _ in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(REPLAYS):
                self.replay(graph)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / REPLAYS)
        return statistics.median(times)


def fill(model: Any) -> None:
    """Random numbers in place of vLLM's dummy weights, which are tiny, and for integers whatever the memory holds."""
    import torch

    parameters = dict(model.named_parameters())
    generator = torch.Generator(next(iter(parameters.values())).device).manual_seed(1)
    eight_bits = any(one.is_floating_point() and one.element_size() == 1 for one in parameters.values())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith("weight_packed"):
                parameter.random_(-(2**31), 2**31 - 1, generator=generator)
            elif name.endswith("weight_scale"):
                parameter.fill_(0.02 / 60 if eight_bits else 0.005)
            elif name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("weight") and parameter.dim() == 1:  # of a norm
                parameter.fill_(1)
            elif name.endswith("weight"):
                spread = 60 if parameter.element_size() == 1 else 0.02
                for part in parameter.data.view(-1).split(2**26):
                    noise = torch.randn(part.shape, generator=generator, device=part.device, dtype=torch.bfloat16)
                    part.copy_(noise * spread)  # 448, the largest e4m3, is over seven deviations


def fill_weights() -> None:
    """`fill` what vLLM loads as ``dummy``, before it gets the order that vLLM's kernels want."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    DummyModelLoader.load_weights = lambda _, model, __: fill(model)


def time_loading() -> list[float]:
    """Gets the seconds that vLLM takes for each model that it loads from now on."""
    import torch
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    load, seconds = BaseModelLoader.load_model, []

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        model = load(*arguments, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return model

    BaseModelLoader.load_model = timed
    return seconds


def read(path: Path) -> float:
    """Seconds to get all tensors of a checkpoint onto the GPU as they are, one file after another."""
    import torch
    from safetensors.torch import load_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=device)  # starts CUDA
    start = time.perf_counter()
    for file in sorted(path.glob("*.safetensors")):
        for tensor in load_file(file, device).values():
            tensor.view(-1)[0].item()  # waits
    seconds = time.perf_counter() - start
    torch.cuda.empty_cache()
    return seconds


def offline(arguments: argparse.Namespace) -> None:
    """All parts but http of the run ``arguments.one``. Waits for a line of input before it uses the GPU."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    figures: Figures = {}
    write(arguments.out, figures)  # imported
    if not sys.stdin.readline():
        return
    run, path, batches = arguments.one, arguments.folder / arguments.one, arguments.batches

    def found(**cells: float) -> None:
        figures.update(cells)
        write(arguments.out, figures)

    if "load" in arguments.parts and run in OURS:
        found(**{"read s": read(path)})
    graphs, loading = Graphs(), time_loading()
    prepare_engine()
    started = time.perf_counter()
    llm = LLM(**engine_options(run, path, batches, arguments.attention_backend))
    found(**{"engine s": time.perf_counter() - started}, GB=torch.cuda.memory_allocated() / 1e9)
    if "load" in arguments.parts and run in OURS:
        found(**{"load s": loading[0]})
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

    def median(*what: int) -> float:
        return statistics.median(seconds(*what) for _ in range(arguments.repeats))

    if "decode" in arguments.parts:
        for batch in batches:
            graphs.replayed.clear()
            seconds(batch, PROMPT, SKIPPED)
            short, long = (median(batch, PROMPT, new) for new in (SKIPPED, SKIPPED + NEW))
            found(**{f"graph {batch}": graphs.milliseconds(), f"step {batch}": (long - short) / NEW * 1e3})
    if "prefill" in arguments.parts:
        for tokens in PREFILLS:
            seconds(1, tokens, 1)
            found(**{f"first token {tokens}": median(1, tokens, 1) * 1e3})


class Alone:
    """A process for `offline`: it imports vLLM at once, together with those of the other runs, and then waits.

    No process imports while another one measures: up to 2048 tokens, a prompt's first token waits for the host.
    """

    def __init__(self, run: str, arguments: argparse.Namespace, folder: Path, out: Path) -> None:
        self.run, self.out = run, out
        command = [sys.executable, __file__, "--one", run, "--folder", folder, "--out", out]
        command += ["--parts", *arguments.parts, "--batches", *map(str, arguments.batches)]
        command += ["--repeats", str(arguments.repeats), *attention_option(arguments.attention_backend)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr)

    def ready(self) -> None:
        """Return once it has imported, or has failed to."""
        while self.process.poll() is None and not self.out.is_file():
            time.sleep(0.1)

    def figures(self, timeout: float) -> Figures:
        """What it has measured when it ends, or after so many seconds."""
        try:
            self.process.communicate(b"go\n", timeout)
        except subprocess.TimeoutExpired:
            print(f"{self.run}: not done after {timeout:.0f} s", flush=True)
            self.process.kill()
            self.process.wait()
        return json.loads(self.out.read_text()) if self.out.is_file() else {}


def attention_option(name: str | None) -> list[str]:
    """For the command line, ours and vLLM's."""
    return [] if name is None else ["--attention-backend", name]


def serve(run: str, path: Path, attention: str | None) -> None:
    """vLLM's HTTP server with fixed routing."""
    os.environ[SERVER] = "1"
    import runpy

    prepare_engine()
    options = engine_options(run, path, [*BATCHES], attention)
    command = ["--port", str(PORT), "--host", "127.0.0.1", "--model", options.pop("model"), "--skip-tokenizer-init"]
    del options["skip_tokenizer_init"], options["enable_prefix_caching"]
    for name, value in options.items():
        command += ["--" + name.replace("_", "-"), json.dumps(value) if isinstance(value, dict) else str(value)]
    sys.argv = ["vllm", *command, "--no-enable-prefix-caching", "--disable-log-stats"]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def http(run: str, path: Path, arguments: argparse.Namespace) -> Figures:
    """Tokens a second through the server."""
    end = time.monotonic() + arguments.timeout
    command = [sys.executable, __file__, "--serve", run, "--folder", str(path.parent)]
    command += attention_option(arguments.attention_backend)
    server = subprocess.Popen(command, stdout=sys.stderr, process_group=0)
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
        with urllib.request.urlopen(request, timeout=max(1, end - time.monotonic())) as answer:
            return json.load(answer)["usage"]["completion_tokens"]

    figures: Figures = {}
    try:
        started = time.monotonic()
        while True:
            try:
                ask(1)
                break
            except urllib.error.HTTPError as error:
                raise RuntimeError(f"the server answers {error.code}: {error.read().decode()[:500]}") from None
            except urllib.error.URLError:
                if server.poll() is not None:
                    raise RuntimeError(f"the server ended with {server.returncode}") from None
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)
        figures["server s"] = time.monotonic() - started
        end = time.monotonic() + arguments.timeout  # a server may take minutes to start
        for count in CONCURRENT:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(ask, [8] * count))
                start = time.perf_counter()
                made = sum(pool.map(ask, [128] * (4 * count)))
                figures[f"tokens/s {count}"] = made / (time.perf_counter() - start)
    except (OSError, RuntimeError) as error:
        print(f"{run}: {type(error).__name__}: {error}", flush=True)
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(20)
        with suppress(ProcessLookupError):  # its engine, if it has not ended
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    return figures


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


def show(results: Results) -> None:
    """A row a figure, a column a run."""
    medians = {
        run: {
            cell: statistics.median(one[cell] for one in rounds if cell in one)
            for cell in dict.fromkeys(cell for one in rounds for cell in one)
        }
        for run, rounds in results.items()
    }
    print(f"{'':<18}" + "".join(f"{run:>10}" for run in medians))
    for cell in dict.fromkeys(cell for figures in medians.values() for cell in figures):
        print(f"{cell:<18}" + "".join(f"{figures.get(cell, float('nan')):>10.2f}" for figures in medians.values()))


def read_results(*files: Path) -> Results:
    """All rounds of some files."""
    results: Results = {}
    for file in files:
        for run, rounds in json.loads(file.read_text()).items():
            results.setdefault(run, []).extend(rounds)
    return results


def measure(arguments: argparse.Namespace, temporary: Path) -> Results:
    """Every run in its turn."""
    out, folder = arguments.out, arguments.folder or temporary
    results = read_results(out) if out and out.is_file() else {}
    paths = {run: prepare(run, folder, arguments.layers) for run in arguments.runs}
    apart = bool(set(arguments.parts) - {"http"})
    for turn in range(arguments.rounds):
        processes = {}
        if apart:
            processes = {run: Alone(run, arguments, folder, temporary / f"{turn}-{run}.json") for run in paths}
        for process in processes.values():
            process.ready()
        for run, path in paths.items():
            figures = processes[run].figures(arguments.timeout) if apart else {}
            if "http" in arguments.parts:
                figures |= http(run, path, arguments)
            if figures:
                print(run, {cell: round(figure, 3) for cell, figure in figures.items()}, flush=True)
                results.setdefault(run, []).append(figures)
                if out:
                    write(out, results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="compile the mixtures' kernels and stop")
    parser.add_argument("--show", type=Path, nargs="+", metavar="JSON", help="print what --out has written and stop")
    parser.add_argument("--runs", nargs="*", default=[*THEIRS, *OURS], choices=[*THEIRS, *OURS])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES), help="of decode")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement of decode and prefill in a round")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="for a process")
    parser.add_argument("--attention-backend", metavar="NAME", help="vLLM's, in place of its choice")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept, by default nowhere")
    parser.add_argument("--out", type=Path, help="add the figures to this JSON file")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own does
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        build_kernels()
    elif arguments.show:
        show(read_results(*arguments.show))
    elif arguments.serve:
        serve(arguments.serve, arguments.folder / arguments.serve, arguments.attention_backend)
    elif arguments.one:
        offline(arguments)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            show(measure(arguments, Path(temporary)))


if __name__ == "__mp_main__" and SERVER in os.environ:  # a process that the server has started
    prepare_engine()

if __name__ == "__main__":
    main()
