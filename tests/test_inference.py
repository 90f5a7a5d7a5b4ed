"""MoE modules on the kernels: every family's module around them, what is refused and why, what is logged.

The kernels themselves need a GPU (`tests/gpu`); here their place is taken by the same mathematics in torch.
"""

import itertools
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from packed import pack

import mxmoe_steps
from mxmoe_steps import check
from mxmoe_steps.errors import UserError
from mxmoe_steps.gating import SWIGLU
from mxmoe_steps.inference import gpu
from mxmoe_steps.inference.build import checkpoint_kernels
from mxmoe_steps.kernels import moe_layer, reference
from mxmoe_steps.kernels.architecture import ROTATED_KERNELS, Architecture
from mxmoe_steps.kernels.architectures import ARCHITECTURES, CAPABILITIES, DEFAULT, PHASES
from mxmoe_steps.kernels.build import TokenKernel
from mxmoe_steps.kernels.plan import LayerPlan
from mxmoe_steps.models.adapters import FAMILIES
from mxmoe_steps.models.families import ACTIVATIONS, open_model
from mxmoe_steps.models.gating import gating_of, kernel_gating
from mxmoe_steps.schemes import SHARED

SIZES = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
FAMILY_SIZES = {"qwen2_moe": {"shared_expert_intermediate_size": 256}, "granitemoehybrid": {"mamba_n_heads": 16}}
SCHEMES = ["w4a16", "w8a8_fp8", "w16a16", "w2a16", "w8a8", "w4a8_fp8", "w8a16", "w6a16", "w4a16_mxfp4"]


class TorchLayer:
    """`MoeLayer` in torch, on the CPU."""

    def __init__(
        self, plan: LayerPlan, read: Any, device: torch.device, gate: torch.Tensor | None, biases: Any = None
    ) -> None:
        plan.check(DEFAULT)
        self.plan, self.stacks, self.device, self.gate, self.biases = plan, read, device, gate, biases

    def read(self, *place: Any) -> Any:
        (stack,) = self.stacks([[place]])
        return stack[0]

    def __call__(self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = None if self.gate is None else (x @ self.gate.T).squeeze(-1)
        shared, plan = self.plan.slices > 0, self.plan
        return reference.moe_layer(
            x, expert_ids, weights, self.read, logits, shared, plan.rotated, plan.gating, self.biases
        ).bfloat16()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a Hopper GPU."""
    monkeypatch.setattr(gpu, "check_hardware", lambda *_: None)
    monkeypatch.setattr(gpu, "MoeLayer", TorchLayer)


def make_packed(folder: Path, family: str, schemes: list[str], **extra: Any) -> Path:
    make_checkpoint(family, folder / "model", dtype=torch.bfloat16, **(SIZES | FAMILY_SIZES.get(family, {}) | extra))
    dealt = itertools.cycle(schemes)
    return pack(folder / "model", folder / "packed", lambda *_: (next(dealt), next(dealt), next(dealt)))


def move(model: Any) -> None:
    gpu.use_kernels(model, map(int, model.config.quantization_config.blocks))


@pytest.mark.parametrize("family", sorted(name for name in FAMILIES if not FAMILIES[name].without_kernels))
def test_every_family_with_kernels_gives_the_logits_of_the_reference(
    family: str, tmp_path: Path, kernels: None
) -> None:
    path = make_packed(tmp_path, family, SCHEMES)
    model = mxmoe_steps.load_quantized(str(path), dtype="bfloat16")
    tokens = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits.float()
        moved = re.compile(r"experts\.|shared_expert\.|mlp\.shared_mlp\.")
        names = {name for name, _ in model.named_parameters() if not moved.search(name)}
        move(model)
        got = model(tokens).logits.float()
    for layer in open_model(path).moe_layers:
        assert isinstance(model.get_submodule(FAMILIES[family].moe_path(layer)), gpu.KernelMoe)
    assert {name for name, _ in model.named_parameters()} == names
    # Rounded to bfloat16 in other places, which flips an 8-bit code or a router's choice now and then.
    assert (got - expected).norm() / expected.norm() < 0.06


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "gemma4"])
def test_the_kernels_are_told_the_gating_of_the_reference(family: str, activation: str) -> None:
    config = {FAMILIES[family].activation: activation, "swiglu_limit": 0.5}
    kernels = kernel_gating(FAMILIES[family], config)
    gate, up = torch.randn(2, 3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    expected = gating_of(FAMILIES[family], config)(gate, up)
    got = reference.product(kernels, gate if kernels.gated else None, up)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert kernels.biased == FAMILIES[family].biased


def test_a_model_on_the_kernels_is_not_saved(tmp_path: Path, kernels: None) -> None:
    model = mxmoe_steps.load_quantized(str(make_packed(tmp_path, "qwen3_moe", ["w4a16"])))
    move(model)
    with pytest.raises(UserError, match="copy the checkpoint, or load it on the CPU"):
        model.save_pretrained(tmp_path / "again")


def test_inputs_must_be_where_the_weights_are(tmp_path: Path, kernels: None) -> None:
    model = mxmoe_steps.load_quantized(str(make_packed(tmp_path, "qwen3_moe", ["w4a16"])))
    move(model)
    with pytest.raises(UserError, match="in kernel order on cpu, their input is on meta"):
        model.get_submodule("model.layers.0.mlp")(torch.empty(1, 2, 128, device="meta"))


@pytest.mark.parametrize(
    ("family", "scheme", "extra", "why"),
    [
        ("qwen3_moe", "w4a4", {}, "scheme w4a4_g128_sym: H100, H200 (sm_90a) have no int4 tensor cores"),
        ("qwen3_moe", "w4a16_g64", {}, "scheme w4a16_g64_asym: no GPU kernel"),
        ("qwen3_moe", "w4a16", {"hidden_size": 96}, "hidden states of 96 features: kernels need a multiple of 64"),
        ("qwen2_moe", "w8a16", {"moe_intermediate_size": 192}, "shared expert of width 256: no multiple"),
        (
            "qwen2_moe",
            "w4a16",
            {"moe_intermediate_size": 192, "shared_expert_intermediate_size": 384},
            "slices of the routed experts' width, 192, and need a multiple of 128",
        ),
        ("gemma4", "w4a16", {"hidden_activation": "silu"}, "router and experts are no module of their own"),
    ],
)
def test_layers_without_a_kernel_stay_and_say_why(
    family: str,
    scheme: str,
    extra: dict[str, Any],
    why: str,
    tmp_path: Path,
    kernels: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = mxmoe_steps.load_quantized(str(make_packed(tmp_path, family, [scheme], **extra)))
    with caplog.at_level(logging.INFO, logger="mxmoe_steps"):
        move(model)
    assert "layers 0-1 run reference arithmetic (" in caplog.text
    assert why in caplog.text
    assert not any(isinstance(module, gpu.KernelMoe) for module in model.modules())
    model(torch.arange(5)[None])


def test_check_says_which_layers_have_no_kernels_and_why(tmp_path: Path) -> None:
    """Two slices of a shared expert, each of a multiple of 32, of 64, which may cut a group, and of 128; one slice."""
    schemes = ["w4a16", "w8a8_fp8"]
    cut = "down blocks under {1}: kernels cut a shared expert into slices of the routed experts' width, {0}, and need"
    expected = {(352, 2): [cut, cut], (192, 2): [cut], (256, 2): [], (352, 1): []}
    for (width, shared), reasons in expected.items():
        sizes = SIZES | {"moe_intermediate_size": width, "n_shared_experts": shared}
        make_checkpoint("deepseek_v3", tmp_path / str(width), **sizes)
        options: Any = SimpleNamespace(candidates=schemes)
        lines = list(check.without_kernels(options, open_model(tmp_path / str(width))))
        for line, reason, scheme in zip(lines, reasons, ["w4a16_g128_asym", "w8a8_g-1_sym_fp8"], strict=False):
            assert line.startswith(
                "1 layers, the first one 1, will run reference arithmetic on GPUs, and predicted times"
            )
            assert reason.format(width, scheme) in line
        assert len(lines) == len(reasons)
    make_checkpoint("qwen3_moe", tmp_path / "hidden", **SIZES | {"hidden_size": 96})
    (line,) = check.without_kernels(SimpleNamespace(candidates=schemes), open_model(tmp_path / "hidden"))  # type: ignore
    assert line.startswith("2 layers, the first one 0, will run reference arithmetic on GPUs")
    assert line.count("hidden states of 96 features: kernels need a multiple of 64") == 1


def test_rotated_checkpoints_give_the_logits_of_the_reference(tmp_path: Path, kernels: None) -> None:
    """Packed blocks read rotated inputs, beside blocks kept in 16 bits, which do not."""
    make_checkpoint("qwen2_moe", tmp_path / "model", **SIZES, shared_expert_intermediate_size=256)
    dealt = itertools.cycle(SCHEMES)
    path = pack(
        tmp_path / "model",
        tmp_path / "packed",
        lambda *_: (next(dealt), next(dealt), next(dealt)),
        quantizer="rtn+hadamard",
    )
    model = mxmoe_steps.load_quantized(str(path), dtype="bfloat16")
    tokens = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits.float()
        move(model)
        got = model(tokens).logits.float()
    assert model.get_submodule("model.layers.0.mlp").layer.plan.rotated
    assert (got - expected).norm() / expected.norm() < 0.06
    names = {kernel.name for kernel in checkpoint_kernels(path, DEFAULT)}
    assert names >= {*ROTATED_KERNELS, *DEFAULT.token_kernels}


def test_some_layers_may_have_kernels_and_others_not(
    tmp_path: Path, kernels: None, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoint("qwen2_moe", tmp_path / "model", **SIZES, shared_expert_intermediate_size=256, num_hidden_layers=4)
    path = pack(
        tmp_path / "model",
        tmp_path / "packed",
        lambda layer, expert: ("w4a4",) * 3 if layer == 2 and expert == SHARED else ("w4a16",) * 3,
    )
    with caplog.at_level(logging.INFO, logger="mxmoe_steps"):
        move(mxmoe_steps.load_quantized(str(path)))
    assert (
        "layers 0-1, 3 run the GPU kernels; layers 2 run reference arithmetic (scheme w4a4_g128_sym: H100, H200"
        in caplog.text
    )


@pytest.mark.parametrize(
    "architecture", [one for one in ARCHITECTURES if "fp8" not in one.operands], ids=lambda one: one.name
)
def test_a_gpu_without_fp8_keeps_layers_of_it_on_the_reference(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_packed(tmp_path, "qwen3_moe", ["w4a16", "w8a8", "w8a8_fp8"])
    monkeypatch.setattr(gpu, "check_hardware", lambda *_: None)
    monkeypatch.setattr(moe_layer, "architecture_of", lambda device: architecture)
    with caplog.at_level(logging.INFO, logger="mxmoe_steps"):
        move(mxmoe_steps.load_quantized(str(path)))
    assert caplog.messages[-1] == (
        f"experts: layers 0-1 run reference arithmetic (scheme w8a8_g-1_sym_fp8: {architecture.gpus}"
        f" ({architecture.target}) have no fp8 tensor cores; kernels there multiply {', '.join(architecture.operands)})"
    )


def test_a_gpu_older_than_the_kernels_gets_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError) as refused:
        gpu.check_hardware(torch.device("cuda", 0), torch.bfloat16)
    assert str(refused.value) == f"Tesla T4 has compute capability 7.5; the kernels are for {CAPABILITIES}"


def test_experts_of_other_gpus_are_one_more_without_blocks(tmp_path: Path) -> None:
    path = make_packed(tmp_path, "qwen2_moe", ["w8a8_fp8", "w4a16"])
    moe = mxmoe_steps.load_quantized(str(path)).get_submodule("model.layers.0.mlp")
    family = FAMILIES["qwen2_moe"]
    blocks = gpu.blocks_of(moe, family, "layer 0")
    here, plan = (gpu.plan_of(blocks, family, SWIGLU, elsewhere) for elsewhere in (False, True))
    assert plan.elsewhere
    assert (plan.experts, plan.slices) == (here.experts + 1, here.slices) == (5, 2)
    for launch, other in ((plan.gate_up, here.gate_up), (plan.down, here.down)):
        assert launch.needs == (*other.needs[:4], 0, *other.needs[4:])
        assert launch.stacks == other.stacks
        moved = [(expert + (expert >= 4), *rest) for expert, *rest in other.problems]
        assert list(launch.problems) == moved


def test_a_checkpoints_kernels_are_those_of_its_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint("qwen2_moe", tmp_path / "model", **SIZES, shared_expert_intermediate_size=256, num_hidden_layers=3)
    layers = [("w4a16", "w4a16", "w8a8_fp8"), ("w4a16", "w4a16", "w4a16"), ("w4a4", "w4a16", "w4a16")]
    path = pack(tmp_path / "model", tmp_path / "packed", lambda layer, _: layers[layer])
    every = checkpoint_kernels(path, DEFAULT)
    assert [one.name for one in every if isinstance(one, TokenKernel)] == list(DEFAULT.token_kernels)
    kernels = [one for one in every if not isinstance(one, TokenKernel)]
    made = {(*(format_.name for format_ in config.formats), config.gated) for config in kernels}
    assert made == {("w4a16_g128_asym", True), ("w4a16_g128_asym", False), ("w8a8_g-1_sym_fp8", False)}
    assert len(kernels) == len({config.name for config in kernels}) == len(made) * len(PHASES)
    assert "layer 2: scheme w4a4_g128_sym: H100, H200 (sm_90a) have no int4 tensor cores" in capsys.readouterr().out


def test_a_checkpoint_of_gpt_oss_has_kernels_of_its_own_and_of_the_format_it_is_published_in(tmp_path: Path) -> None:
    path = make_packed(tmp_path, "gpt_oss", ["w4a16_mxfp4"], hidden_size=192, intermediate_size=96)
    kernels = checkpoint_kernels(path, DEFAULT)
    around = {kernel.name for kernel in kernels if isinstance(kernel, TokenKernel)}
    own = {"activate_clamped-biased", "combine_bf16_biased", "combine_float32_biased"}
    assert around == own | set(DEFAULT.token_kernels)
    made = {
        (format_.name, config.gated) for config in kernels if config.name not in around for format_ in config.formats
    }
    assert made == {("w4a16_g32_sym_mxfp4", False)}


def test_without_a_gpu_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_packed(tmp_path, "qwen3_moe", ["w4a16"])
    with caplog.at_level(logging.INFO, logger="mxmoe_steps"):
        model = mxmoe_steps.load_quantized(str(path))
        model(torch.arange(5)[None])
    assert caplog.messages == ["experts: all layers run reference arithmetic (on the cpu)"]
