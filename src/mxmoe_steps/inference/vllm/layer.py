"""The experts of one layer on one rank: what vLLM loads them into, and what computes them then.

On a GPU that there are kernels for that is `MoeLayer`: routed and shared experts in one call where the hidden states
are this rank's own tokens, else the shared expert in a call of its own. Elsewhere it is the reference arithmetic, which
waits for the GPU and so is refused there, unless the user asks for eager execution.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from mxmoe_steps.errors import UserError
from mxmoe_steps.inference.gpu import check_hardware, layer_on_kernels
from mxmoe_steps.inference.vllm.blocks import Blocks
from mxmoe_steps.kernels.moe_layer import MoeLayer
from mxmoe_steps.models.adapters import Family
from mxmoe_steps.models.gating import gating_of, kernel_gating
from mxmoe_steps.models.operators import define
from mxmoe_steps.models.packed import MixedExperts
from mxmoe_steps.schemes import SHARED, Scheme

logger = init_logger("vllm.mxmoe")  # vLLM configures loggers below its own


class PackedLayer:
    """``schemes``: of gate, up and down by expert, `SHARED` included; ``model``: the language model's configuration."""

    def __init__(
        self, number: int, schemes: dict[int, list[Scheme]], rotated: bool, family: Family, model: Mapping[str, Any]
    ) -> None:
        self.number, self.schemes, self.rotated, self.family = number, schemes, rotated, family
        self.gating, self.kernel_gating = gating_of(family, model), kernel_gating(family, model)
        engine = get_current_vllm_config()
        check_options(engine)
        self.dtype, self.eager = engine.model_config.dtype, bool(engine.model_config.enforce_eager)
        self.blocks: list[Blocks] = []  # that wait for their tensors
        self.experts: MixedExperts | None = None  # routed ones of this rank, until they are in kernel order
        self.shared: dict[str, nn.Module] = {}  # gate_proj, up_proj, down_proj, likewise
        self.device = torch.device("cpu")
        self.runner: Any = None  # of vLLM, once its experts are loaded
        self.local: torch.Tensor | None = None  # int64, by global number; None where all experts are here
        self.scale = 1.0  # of router weights
        self.compute: Callable[..., torch.Tensor] = _not_loaded

    def __call__(self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum of this rank's experts, [T, H], of hidden states [T, H], global expert numbers and weights [T, k]."""
        if self.family.scales_inputs:  # one expert a token, see `create_weights`
            hidden, weights = (hidden * weights).to(hidden.dtype), torch.ones_like(weights)
        expert_ids = expert_ids if self.local is None else self.local[expert_ids]
        return self.compute(hidden, expert_ids, weights if self.scale == 1.0 else weights * self.scale)

    def load(self, expert: int, block: str, part: str, tensor: torch.Tensor) -> None:
        """Keep this rank's share of a whole tensor of the checkpoint; `UserError` where no block here waits for it."""
        if not self.blocks:
            raise UserError(f"layer {self.number}: packed experts are loaded once, and they are; restart vLLM")
        for blocks in self.blocks:
            if blocks.have(expert, block):
                blocks.load(expert, block, part, tensor)
                return
        if expert == SHARED or expert not in self.schemes:
            what = "the shared expert" if expert == SHARED else f"expert {expert}"
            raise UserError(
                f"layer {self.number}: vLLM's model does not take {what} from packed tensors: {block}: {part}"
            )

    def finish(self, blocks: Blocks) -> None:
        """`UserError` unless all tensors of ``blocks`` have come; nothing here keeps their modules then."""
        blocks.finish()
        self.blocks.remove(blocks)

    def loaded(self) -> None:
        """Tell that routed experts, or a block of the shared one, are complete; once all are, choose what computes."""
        experts = self.experts
        if (
            experts is None
            or self.runner is None
            or (SHARED in self.schemes and len(self.shared) < len(self.family.own_blocks))
        ):
            return
        try:
            check_hardware(self.device, self.dtype)
            self._move(dict(enumerate(experts)), nn.ModuleDict(self.shared))
        except UserError as error:
            self._stay(experts, str(error))
            return
        logger.info_once("mxmoe: experts run the GPU kernels")
        self.experts = None
        for linear in self.shared.values():  # vLLM's layers keep the modules
            for tensor in (*linear.parameters(), *linear.buffers()):
                tensor.data = tensor.data.new_empty(0)

    def _move(self, experts: dict[int, nn.Module], shared: nn.ModuleDict) -> None:
        """To the kernels; `UserError` where there are none, and nothing has changed then."""
        make = partial(layer_on_kernels, family=self.family, gating=self.kernel_gating, device=self.device)
        elsewhere = self.local is not None
        if not shared:
            self.compute = make(experts, elsewhere=elsewhere)
            return
        module = self.runner._shared_experts and self.runner._shared_experts._layer
        gate = getattr(module, "expert_gate", None)
        if module is None or (gate is None) != (self.family.shared_gate is None):
            raise UserError("vLLM runs the shared expert outside of its MoE layer")
        weight = None if gate is None else gate.weight.detach()
        if not (self._mixed_tokens() or self.family.scales_inputs):
            try:
                self.compute = make({**experts, SHARED: shared}, gate=weight, elsewhere=elsewhere)
            except UserError as error:
                logger.info_once("mxmoe: the shared expert runs in a call of its own (%s)", str(error))
            else:
                self.scale, self.runner.routed_scaling_factor = self.runner.routed_scaling_factor, 1.0
                self.runner._shared_experts = None
                self.runner._forward_entry = self.runner._select_forward()
                return
        alone = SharedExpert(make({0: shared}), gate)
        self.compute = make(experts, elsewhere=elsewhere)
        self.runner._shared_experts._layer = alone

    def _mixed_tokens(self) -> bool:
        """Whether routed experts also get tokens of other ranks, whose shared expert is run there."""
        parallel = self.runner.moe_config.moe_parallel_config
        return parallel.dp_size > 1 or parallel.is_sequence_parallel or getattr(parallel, "pcp_size", 1) > 1

    def _stay(self, experts: MixedExperts, why: str) -> None:
        """Reference arithmetic."""
        self.compute = experts.routed_sum
        if self.device.type != "cuda":
            logger.info_once("mxmoe: experts run reference arithmetic (%s)", why)
            return
        if not self.eager:
            raise UserError(
                f"layer {self.number}: no GPU kernels ({why}), and reference arithmetic does not work in CUDA graphs;"
                " add --enforce-eager to run it, slowly"
            )
        logger.warning("mxmoe: the experts of layer %d run reference arithmetic, slowly (%s)", self.number, why)


class SharedExpert(nn.Module):
    """A shared expert in a call of its own, as a layer of one expert that every token chooses."""

    def __init__(self, layer: MoeLayer, gate: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.gate = layer, gate

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] to [T, H]."""
        expert_ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
        weights = (
            torch.ones_like(expert_ids, dtype=torch.float32) if self.gate is None else self.gate(hidden)[0].sigmoid()
        )
        return self.layer(hidden, expert_ids, weights)


def check_options(engine: VllmConfig) -> None:
    """`UserError` for what packed experts cannot do."""
    for refused, option, why in (
        (engine.lora_config is not None, "LoRA (--enable-lora)", "they take no adapters"),
        (engine.parallel_config.enable_eplb, "EPLB (--enable-eplb)", "they are not moved between ranks"),
    ):
        if refused:
            raise UserError(f"{option} does not work with packed experts: {why}; leave it out")


def _not_loaded(*_: torch.Tensor) -> torch.Tensor:
    raise UserError("the experts are not loaded")


def _of_current_model(layer_name: str) -> PackedLayer:
    """The layer that vLLM calls by this name, in the model that runs."""
    return get_forward_context().no_compile_layers[layer_name].routed_experts.quant_method.packed


# By name, as vLLM's own operators: what it compiles is kept on disk, for processes whose layers are other objects.
packed_layer = define(
    "packed_layer(Tensor hidden, Tensor expert_ids, Tensor weights, str name) -> Tensor",
    PackedLayer.__call__,
    find=_of_current_model,
)
