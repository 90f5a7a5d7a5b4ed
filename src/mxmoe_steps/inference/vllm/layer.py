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
from mxmoe_steps.kernels.stacks import Place
from mxmoe_steps.models.adapters import Family
from mxmoe_steps.models.finite import BadNumbersError
from mxmoe_steps.models.gating import gating_of, kernel_gating
from mxmoe_steps.models.operators import define
from mxmoe_steps.models.packed import MixedExpert, MixedExperts, StoredBlock, linear_of
from mxmoe_steps.schemes import SHARED, Scheme

logger = init_logger("vllm.mxmoe")  # vLLM configures loggers below its own

_LASTING = ("auto", "hf", "safetensors")  # load formats whose tensors stay as they are: others reuse buffers
_NOT_READ = ("dummy", "sharded_state", "runai_streamer_sharded", "tensorizer")  # that read no checkpoint's files


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
        self.lasting = engine.load_config.load_format in _LASTING
        # Blocks that have all come, until something computes; this rank's experts are numbered from 0
        self.routed: dict[Place, StoredBlock] | None = None
        self.shared: dict[Place, StoredBlock] = {}
        self.shared_modules: dict[str, nn.ModuleDict] = {}  # by kind of block: takes its module where it stays
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

    @property
    def is_loaded(self) -> bool:
        """Whether all has come, and something computes."""
        return self.compute is not _not_loaded

    def load(self, expert: int, block: str, part: str, tensor: torch.Tensor) -> None:
        """Keep this rank's share of a whole tensor of the checkpoint; `UserError` where no block here waits for it."""
        if not self.blocks:
            raise UserError(f"layer {self.number}: packed experts are loaded once, and they are; restart vLLM")
        for blocks in self.blocks:
            if blocks.have(expert, block):
                blocks.load(expert, block, part, tensor if self.lasting else tensor.clone())
                return
        if expert == SHARED or expert not in self.schemes:
            what = "the shared expert" if expert == SHARED else f"expert {expert}"
            raise UserError(
                f"layer {self.number}: vLLM's model does not take {what} from packed tensors: {block}: {part}"
            )

    def finish(self, blocks: Blocks) -> dict[Place, StoredBlock]:
        """What ``blocks`` waited for; `UserError` unless all of it has come."""
        self.blocks.remove(blocks)
        return blocks.finish()

    def loaded(self) -> None:
        """Tell that routed experts, or a block of the shared one, are complete; once all are, choose what computes."""
        shared = len(self.family.own_blocks) if SHARED in self.schemes else 0
        if self.routed is None or self.runner is None or len(self.shared) < shared:
            return
        try:
            check_hardware(self.device, self.dtype)
            self._move(self.routed)
        except BadNumbersError:
            raise
        except UserError as error:
            self._stay(self.routed, str(error))
        else:
            logger.info_once("mxmoe: experts run the GPU kernels")
        self.routed, self.shared = None, {}

    def _move(self, routed: dict[Place, StoredBlock]) -> None:
        """To the kernels; `UserError` where there are none, and nothing has changed then."""
        make = partial(layer_on_kernels, family=self.family, gating=self.kernel_gating, device=self.device)
        elsewhere = self.local is not None
        if not self.shared:
            self.compute = make(routed, elsewhere=elsewhere)
            return
        module = self.runner._shared_experts and self.runner._shared_experts._layer
        gate = getattr(module, "expert_gate", None)
        if module is None or (gate is None) != (self.family.shared_gate is None):
            raise UserError("vLLM runs the shared expert outside of its MoE layer")
        weight = None if gate is None else gate.weight.detach()
        if not (self._mixed_tokens() or self.family.scales_inputs):
            try:
                self.compute = make(routed | self.shared, gate=weight, elsewhere=elsewhere)
            except BadNumbersError:
                raise
            except UserError as error:
                logger.info_once("mxmoe: the shared expert runs in a call of its own (%s)", str(error))
            else:
                self.scale, self.runner.routed_scaling_factor = self.runner.routed_scaling_factor, 1.0
                self.runner._shared_experts = None
                self.runner._forward_entry = self.runner._select_forward()
                return
        alone = SharedExpert(make({(0, kind): block for (_, kind), block in self.shared.items()}), gate)
        self.compute = make(routed, elsewhere=elsewhere)
        self.runner._shared_experts._layer = alone

    def _mixed_tokens(self) -> bool:
        """Whether routed experts also get tokens of other ranks, whose shared expert is run there."""
        parallel = self.runner.moe_config.moe_parallel_config
        return parallel.dp_size > 1 or parallel.is_sequence_parallel or getattr(parallel, "pcp_size", 1) > 1

    def _stay(self, routed: dict[Place, StoredBlock], why: str) -> None:
        """Reference arithmetic."""
        if self.device.type == "cuda" and not self.eager:
            raise UserError(
                f"layer {self.number}: no GPU kernels ({why}), and reference arithmetic does not work in CUDA graphs;"
                " add --enforce-eager to run it, slowly"
            )
        if self.device.type == "cuda":
            logger.warning("mxmoe: the experts of layer %d run reference arithmetic, slowly (%s)", self.number, why)
        else:
            logger.info_once("mxmoe: experts run reference arithmetic (%s)", why)
        for block in (*routed.values(), *self.shared.values()):
            block.check()
        experts: dict[int, dict[str, nn.Module]] = {}
        for (number, kind), block in routed.items():
            experts.setdefault(number, {})[f"{kind}_proj"] = linear_of(block, self.device, self.dtype)
        self.compute = MixedExperts(MixedExpert(linears, self.gating) for linears in experts.values()).routed_sum
        for (_, kind), block in self.shared.items():
            self.shared_modules[kind][kind] = linear_of(block, self.device, self.dtype)


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
    load_format = engine.load_config.load_format
    for refused, option, why in (
        (engine.lora_config is not None, "LoRA (--enable-lora)", "they take no adapters"),
        (engine.parallel_config.enable_eplb, "EPLB (--enable-eplb)", "they are not moved between ranks"),
        (load_format in _NOT_READ, f"--load-format {load_format}", "they are read from the checkpoint's own files"),
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
