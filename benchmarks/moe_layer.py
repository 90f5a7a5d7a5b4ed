"""Time of a whole MoE layer, hidden states to hidden states, stage by stage, beside transformers' own experts.

    python benchmarks/moe_layer.py --build            # compile what the benchmark loads; needs no GPU
    python benchmarks/moe_layer.py --out layer.json   # measure; needs an H100
    python benchmarks/moe_layer.py --draw layer.json docs/images/layer.svg   # stages of the first workload

Everything after the router: sort, dispatch with quantization, gate/up grouped GEMM, SwiGLU with quantization, down
grouped GEMM, weighted sum; the shared expert with its sigmoid gate where the model has one. The peer is the model's
MoE module in transformers with ``experts_implementation="grouped_mm"`` in bfloat16, router left out as well. Workloads,
routing and timing as in group_gemm.py: CUDA graphs, median of replays, L2 flushed before each. Mixtures: ``hot``, the
shared expert and the busiest quarter of the routed ones at w8a8_fp8 and the others at w4a16; ``blocks``, one of
w2a16, w4a16 and w8a8_fp8 for every block at random. ``+hadamard`` after any of them: with rotated inputs.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from group_gemm import WORKLOADS, Workload, floor_us, random_weights

from mxmoe_steps.kernels import reference
from mxmoe_steps.kernels.architecture import ROTATED_KERNELS
from mxmoe_steps.kernels.architectures import DEFAULT
from mxmoe_steps.kernels.build import TokenKernel, build
from mxmoe_steps.kernels.moe_layer import MoeLayer
from mxmoe_steps.kernels.plan import LayerPlan, Schemes, plan_layer
from mxmoe_steps.kernels.stacks import Place, in_memory
from mxmoe_steps.quantizers.grid import QuantizedWeight
from mxmoe_steps.quantizers.names import ROTATED, is_rotated
from mxmoe_steps.schemes import SHARED, parse_scheme
from mxmoe_steps.timing.stages import STAGES, stages_of
from mxmoe_steps.timing.timer import Timer

TOKENS = (1, 16, 64, 256, 1024, 4096, 8192)
SLICES = {"qwen1.5-moe": 4, "deepseek-v2-lite": 2, "mixtral-8x7b": 0}  # width of the shared expert / routed
GATED = ("qwen1.5-moe",)
RUNS = ("w16a16", "w8a8_fp8", "w4a16", "hot", "blocks")
CHECKED_TOKENS = 16
DRAWN_TOKENS = (16, 256, 1024, 8192)


def schemes_of(run: str, workload: Workload) -> dict[int, Schemes]:
    """Schemes of every expert under a run's name."""
    run = run.removesuffix(ROTATED)
    w4, fp8 = parse_scheme("w4a16"), parse_scheme("w8a8_fp8")
    numbers = [*range(workload.experts), *([SHARED] if SLICES[workload.name] else [])]
    if run == "hot":
        rows = workload.routing(8192)
        busy = sorted(range(workload.experts), key=lambda expert: -rows[expert])[: workload.experts // 4]
        return {e: (fp8,) * 3 if e == SHARED or e in busy else (w4,) * 3 for e in numbers}
    if run == "blocks":
        rng = random.Random(0)
        deck = [parse_scheme("w2a16"), w4, fp8]
        return {e: (rng.choice(deck), rng.choice(deck), rng.choice(deck)) for e in numbers}
    return {e: (parse_scheme(run),) * 3 for e in numbers}


def plan_run(run: str, workload: Workload) -> LayerPlan:
    inner = workload.intermediate
    shared = inner * SLICES[workload.name]
    return plan_layer(schemes_of(run, workload), workload.hidden, inner, shared, rotated=is_rotated(run))


def make_layer(run: str, workload: Workload) -> tuple[MoeLayer, dict[Place, QuantizedWeight | torch.Tensor]]:
    """The layer with random weights, and those weights."""
    weights: dict[Place, QuantizedWeight | torch.Tensor] = {}
    for expert, three in schemes_of(run, workload).items():
        width = workload.intermediate * (SLICES[workload.name] if expert == SHARED else 1)
        for block, scheme in zip(("gate", "up", "down"), three, strict=True):
            n, k = (workload.hidden, width) if block == "down" else (width, workload.hidden)
            stack, _ = random_weights(scheme, 1, n, k)
            weights[expert, block] = stack[0]
    plan = plan_run(run, workload)
    gated = workload.name in GATED
    gate = torch.randn(1, workload.hidden, device="cuda").bfloat16() * 0.02 if gated else None
    return MoeLayer(plan, in_memory(weights), torch.device("cuda", 0), gate), weights


def inputs(workload: Workload, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, expert_ids experts and router weights."""
    x = torch.randn(tokens, workload.hidden, device="cuda").bfloat16()
    weights = torch.rand(tokens, workload.top_k, device="cuda").softmax(-1).bfloat16()
    return x, workload.choices(tokens).cuda(), weights


def floor_of(layer: MoeLayer, workload: Workload, tokens: int) -> float:
    """Sum of the two grouped GEMMs' floors, microseconds."""
    rows = [*workload.routing(tokens), *[tokens] * layer.plan.slices]
    total = 0.0
    for gemm, n, k in (
        (layer.gate_up, layer.plan.intermediate, layer.plan.hidden),
        (layer.down, layer.plan.hidden, layer.plan.intermediate),
    ):
        shares: list[list[int]] = [[] for _ in gemm.plan.formats]
        for expert, number, _, _ in gemm.plan.problems:
            shares[number] += [rows[expert]] * (2 if gemm.plan.gated else 1)
        total += floor_us(list(gemm.plan.formats), shares, n, k)
    return total


def measure_layer(timer: Timer, run: str, workload: Workload, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """Total and stages over the token counts."""
    layer, weights = make_layer(run, workload)
    cells = []
    for count in tokens:
        x, expert_ids, mixing = inputs(workload, count)
        stages = stages_of(layer, x, expert_ids, mixing)
        cell = {"run": run, "T": count, "floor_us": floor_of(layer, workload, count)}
        cell |= {"us": timer(lambda: layer(x, expert_ids, mixing))}  # noqa: B023
        cell |= {stage: timer(function) for stage, function in stages.items()}
        if count == CHECKED_TOKENS:
            out = layer(x, expert_ids, mixing).double()
            _, logits = layer.dispatch(x, layer.sort(expert_ids))
            shared, rotated = layer.plan.slices > 0, layer.plan.rotated
            exact = reference.moe_layer(x, expert_ids, mixing, lambda e, b: weights[e, b], logits, shared, rotated)
            cell |= {"error": ((out - exact).norm() / exact.norm()).item()}
        cells.append(cell)
    return cells


def measure_peer(timer: Timer, workload: Workload, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """transformers' grouped_mm experts and, where there is one, its shared expert, bfloat16."""
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    slices = SLICES[workload.name]
    config = Qwen2MoeConfig(
        hidden_size=workload.hidden,
        moe_intermediate_size=workload.intermediate,
        shared_expert_intermediate_size=max(slices, 1) * workload.intermediate,
        num_experts=workload.experts,
        num_experts_per_tok=workload.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("cuda"):
        module = Qwen2MoeSparseMoeBlock(config).bfloat16().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    cells = []
    for count in tokens:
        x, expert_ids, mixing = inputs(workload, count)

        def run() -> torch.Tensor:
            routed = module.experts(x, expert_ids, mixing)  # noqa: B023
            if not slices:
                return routed
            shared = module.shared_expert(x)  # noqa: B023
            if workload.name in GATED:
                shared = torch.sigmoid(module.shared_expert_gate(x)) * shared  # noqa: B023
            return routed + shared

        try:
            cells.append({"run": "transformers grouped_mm", "T": count, "us": timer(run)})
        except RuntimeError as error:
            print(f"grouped_mm T={count}: {str(error).splitlines()[0]}", flush=True)
    return cells


def print_tables(workload: Workload, cells: list[dict[str, Any]], tokens: tuple[int, ...]) -> None:
    """Totals, then the stages of every run."""
    print(f"{workload.name}: us" + "".join(f"{count:>10}" for count in tokens) + "   error")
    by_run = {run: [cell for cell in cells if cell["run"] == run] for run in dict.fromkeys(c["run"] for c in cells)}
    for run, mine in by_run.items():
        values = {cell["T"]: cell["us"] for cell in mine}
        error = "".join(f"   {cell['error']:.1e}" for cell in mine if "error" in cell)
        print(f"{run:<24}" + "".join(f"{values.get(count, float('nan')):>10.1f}" for count in tokens) + error)
    for run, mine in by_run.items():
        for stage in (*STAGES, "floor_us"):
            if stage in mine[0]:
                print(f"  {run} {stage:<16}" + "".join(f"{cell[stage]:>10.1f}" for cell in mine), flush=True)


def draw(source: Path, target: Path) -> None:
    """Stages of the first workload in ``source``, stacked, beside the peer, for a few token counts."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "mxmoe-steps", "font.size": 9})
    cells = json.loads(source.read_text())
    mine = [cell for cell in cells if cell["workload"] == cells[0]["workload"]]
    figure, axes = plt.subplots(1, len(DRAWN_TOKENS), figsize=(10, 3.2), layout="constrained")
    for ax, count in zip(axes, DRAWN_TOKENS, strict=True):
        column = [cell for cell in mine if cell["T"] == count]
        places = range(len(column))
        bottom = [0.0] * len(column)
        for stage, colour in zip(STAGES, plt.cm.tab10.colors, strict=False):
            heights = [cell.get(stage, 0.0) for cell in column]
            ax.bar(places, heights, bottom=bottom, color=colour, label=stage)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        whole = [0.0 if stages else cell["us"] for cell, stages in zip(column, bottom, strict=True)]
        ax.bar(places, whole, color="0.75", label="all of the peer")
        ax.set_xticks(places, [cell["run"].split()[-1] for cell in column], rotation=60, ha="right")
        ax.set_title(f"{count} tokens")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("microseconds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="compile the kernels and stop")
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("JSON", "SVG"), help="draw an earlier --out and stop")
    parser.add_argument(
        "--runs", nargs="*", default=list(RUNS), help="schemes, the mixtures hot and blocks, any +hadamard"
    )
    parser.add_argument("--workloads", nargs="*", default=[workload.name for workload in WORKLOADS])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, help="write every cell as JSON")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(*arguments.draw)
        return
    workloads = [workload for workload in WORKLOADS if workload.name in arguments.workloads]
    if arguments.build:
        plans = [plan_run(run, workload) for run in arguments.runs for workload in workloads]
        launches = [launch for plan in plans for launch in (plan.gate_up, plan.down)]
        for config in {config: None for launch in launches for config in launch.kernels(DEFAULT).values()}:
            print(build(config), config.name, flush=True)
        rotated = ROTATED_KERNELS if any(plan.rotated for plan in plans) else ()
        for name in (*DEFAULT.token_kernels, *rotated):
            print(build(TokenKernel(name)), name)
        return
    torch.manual_seed(0)
    timer, tokens = Timer(), tuple(arguments.tokens)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    everything = []
    for workload in workloads:
        cells = measure_peer(timer, workload, tokens)
        for run in arguments.runs:
            torch.cuda.empty_cache()
            cells += measure_layer(timer, run, workload, tokens)
        print_tables(workload, cells, tokens)
        everything += [cell | {"workload": workload.name} for cell in cells]
        if arguments.out:
            arguments.out.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
