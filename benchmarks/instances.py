"""Made-up allocation instances of true sizes: losses and routing are random, shapes are those of real models."""

import numpy as np

from mxmoe_steps.allocation.blocks import Blocks, Losses
from mxmoe_steps.allocation.enlarged import layer_blocks
from mxmoe_steps.profile import fit_profile
from mxmoe_steps.schemes import SHARED, parse_scheme
from mxmoe_steps.timing.estimate import estimate_profile, measured_file, read_hardware
from mxmoe_steps.timing.predict import block_times
from mxmoe_steps.timing.profile import Profile, profile_of
from mxmoe_steps.timing.traffic import Traffic

SCHEMES = ("w2a16", "w3a16", "w4a16", "w4a8_fp8", "w8a16", "w8a8_fp8")
MODELS = {  # layers, experts, top-k, hidden, expert width, shared expert's width
    "qwen1.5-moe": (24, 60, 4, 2048, 1408, 5632),
    "deepseek-v2-lite": (26, 64, 6, 2048, 1408, 2816),
    "qwen3-30b-a3b": (48, 128, 8, 2048, 768, 0),
}


def make_blocks(model: str, layers: int | None = None) -> Blocks:
    """The blocks of a model, or of its first layers."""
    count, experts, _, hidden, width, shared = MODELS[model]
    return layer_blocks(list(range(layers or count)), experts, hidden, width, shared)


def make_losses(blocks: Blocks, seed: int = 0) -> Losses:
    """Squared losses that fall fourfold per bit, lognormal over blocks, ten times larger for the shared expert."""
    generator = np.random.default_rng(seed)
    schemes = tuple(sorted(parse_scheme(text) for text in SCHEMES))
    size = generator.lognormal(0, 1.2, (len(blocks), 1)) * np.where(blocks.expert == SHARED, 10, 1)[:, None]
    step = np.array([4.0**-s.weight_bits + (2e-4 if s.fp8 else 2e-4 * (s.act_bits == 8)) for s in schemes])
    loss = size * step * generator.lognormal(0, 0.25, (len(blocks), len(schemes)))
    bits = np.array([[round(s.bits(int(k)) * n * k) for s in schemes] for n, k in
                     zip(blocks.out_features, blocks.in_features, strict=True)])  # fmt: skip
    tokens = np.ones(len(blocks), np.int64)
    return Losses(blocks, schemes, loss, bits, "synthetic", ("text",), loss[None], tokens)


def make_traffic(model: str, tokens: int, layers: int, steps: int = 16, seed: int = 0) -> Traffic:
    """Multinomial routing with lognormal popularity (tenfold between experts, as traced models show)."""
    _, experts, top_k, *_ = MODELS[model]
    generator = np.random.default_rng(seed)
    rows = np.zeros((layers, steps, experts), np.int64)
    for layer in range(layers):
        popularity = generator.lognormal(0, 0.7, experts)
        rows[layer] = generator.multinomial(tokens * top_k, popularity / popularity.sum(), steps)
    return Traffic(tuple(range(layers)), tokens, rows, np.full(rows.shape, 1 / steps))


def h100(measured: bool = False) -> Profile:
    """The profile of an H100: the roofline estimate, or what was measured."""
    schemes = [parse_scheme(text) for text in SCHEMES]
    file = measured_file("h100")
    assert file is not None
    columns, facts = fit_profile(file, schemes) if measured else estimate_profile(schemes, read_hardware("h100"))
    return profile_of({name: np.array(values) for name, values in columns.items()}, facts)


def make_problem(  # type: ignore[no-untyped-def]
    model, tokens, layers=None, granularity="block", budget="4.5", constraints=None, measured=False
):
    """A `Problem` of a model, or of its first layers."""
    from mxmoe_steps.allocation.build import build_problem
    from mxmoe_steps.allocation.constraints import Constraints

    blocks = make_blocks(model, layers)
    losses = make_losses(blocks)
    times = block_times(
        blocks, list(losses.schemes), make_traffic(model, tokens, blocks.layer.max() + 1), h100(measured)
    )
    everything = np.ones(len(blocks), bool)
    return build_problem(
        losses, list(losses.schemes), times, granularity, budget, constraints or Constraints(), everything
    )[0]
