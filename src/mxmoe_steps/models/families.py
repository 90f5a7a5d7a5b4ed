"""Where each supported model family keeps its expert weights, as names of checkpoint tensors.

Facts of the published checkpoints, not of the model classes: `calibrate` and `quantize` read weights straight from
safetensors and never build a model. A checkpoint has one tensor per expert and block, or, as transformers 5 may also
save it, one per layer for gate and up of all experts and one for down.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.raw import RawTensor, tensors_of
from mxmoe_steps.schemes import BLOCKS, SHARED


@dataclass(frozen=True)
class Family:
    """Tensor names of one ``model_type``.

    ``moe`` is the MoE module of a layer inside the checkpoint; ``blocks`` the names of gate, up and
    down there; ``shared`` the shared expert's module, ``shared_gate`` its sigmoid gate.
    """

    moe: str = "mlp"
    blocks: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str | None = None
    shared_gate: str | None = None


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # depends on family and version
_W123 = ("w1", "w3", "w2")
FAMILIES: Mapping[str, Family] = {
    "qwen2_moe": Family(shared="shared_expert", shared_gate="shared_expert_gate"),
    "qwen3_moe": Family(),
    "olmoe": Family(),
    "mixtral": Family(moe="block_sparse_moe", blocks=_W123),
    "phimoe": Family(moe="block_sparse_moe", blocks=_W123),
    "minimax": Family(moe="block_sparse_moe", blocks=_W123),
    "deepseek_v2": Family(shared="shared_experts"),
    "deepseek_v3": Family(shared="shared_experts"),
    "glm4_moe": Family(shared="shared_experts"),
    "dots1": Family(shared="shared_experts"),
}


@dataclass(frozen=True)
class Place:
    """Where a checkpoint keeps the weight of one linear block: in a tensor of its own, or in one of all experts.

    The latter are ``gate_up_proj`` [E, 2I, H], gate's rows before up's, and ``down_proj`` [E, H, I].
    """

    tensor: str
    expert: int | None = None
    block: str = ""

    def rows(self, total: int) -> slice:
        """The block's rows among those of its expert."""
        if self.block == "down":
            return slice(0, total)
        return slice(0, total // 2) if self.block == "gate" else slice(total // 2, total)


@dataclass(frozen=True)
class ModelFolder:
    """A local checkpoint folder and what its ``config.json`` says about experts."""

    path: Path
    family: Family
    config: dict[str, Any]

    @property
    def experts(self) -> int:
        """Routed experts per layer."""
        for key in _EXPERT_COUNTS:
            if key in self.config:
                return int(self.config[key])
        raise UserError(f"{self.path}/config.json: none of the keys {', '.join(_EXPERT_COUNTS)} says how many experts")

    @property
    def is_packed(self) -> bool:
        """Whether `quantize` wrote the folder."""
        return self.config.get("quantization_config") is not None

    @property
    def activation(self) -> str:
        """Name of the activation between gate and down, e.g. ``silu``."""
        return str(self.config.get("hidden_act", "silu"))

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> safetensors file."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            for file in sorted(set(weight_map.values())):
                if not (self.path / file).is_file():
                    raise UserError(f"{self.path / file}: missing, though the checkpoint's index names it; download it")
            return {name: self.path / file for name, file in weight_map.items()}
        single = self.path / "model.safetensors"
        if not single.is_file():
            raise UserError(f"{self.path}: holds neither model.safetensors nor model.safetensors.index.json")
        return dict.fromkeys(tensors_of(single), single)

    @cached_property
    def moe_layers(self) -> list[int]:
        """Indices of the decoder layers that have experts."""
        if self.is_packed:
            return sorted(map(int, self.config["quantization_config"]["blocks"]))
        found = [
            layer
            for layer in range(int(self.config["num_hidden_layers"]))
            if self.place(layer, 0, "gate").tensor in self.files
        ]
        if not found:
            raise UserError(f"{self.path}: no tensor named like {self.block_name(0, 0, 'gate')}; is it an MoE model?")
        return found

    def block_name(self, layer: int, expert: int, block: str) -> str:
        """Checkpoint name of one linear block's weight, [out_features, in_features]."""
        inner = self.family.shared if expert == SHARED else f"experts.{expert}"
        return f"model.layers.{layer}.{self.family.moe}.{inner}.{self.family.blocks[BLOCKS.index(block)]}.weight"

    def place(self, layer: int, expert: int, block: str) -> Place:
        """Where the block's weight is."""
        name = self.block_name(layer, expert, block)
        stacked = f"{moe_path(layer)}.experts.{'down_proj' if block == 'down' else 'gate_up_proj'}"
        if name in self.files or stacked not in self.files or expert == SHARED:
            return Place(name)
        return Place(stacked, expert, block)

    def raw_block(self, layer: int, expert: int, block: str) -> RawTensor:
        """The block's weight as bytes of its file."""
        place = self.place(layer, expert, block)
        source = tensors_of(self.files[place.tensor])[place.tensor]
        if place.expert is None:
            return source
        experts, total, in_features = source.shape
        rows = place.rows(total)
        row_bytes = source.nbytes // (experts * total)
        start = source.start + (place.expert * total + rows.start) * row_bytes
        stop = start + (rows.stop - rows.start) * row_bytes
        return RawTensor(source.file, source.dtype, (rows.stop - rows.start, in_features), start, stop)

    def expert_ids(self) -> list[int]:
        """Routed experts, then the shared one (`SHARED`) where the family has it."""
        shared = [SHARED] if self.family.shared is not None else []
        return [*range(self.experts), *shared]


def open_model(path: str | Path) -> ModelFolder:
    """Read a local model folder's ``config.json``; `UserError` for a missing or unsupported model."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; set model.path to a local folder or a hub id")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{folder}: no config.json; set model.path to a transformers checkpoint folder")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        raise UserError(
            f"{config_file}: model_type {config.get('model_type')!r} is not supported;"
            f" supported are {', '.join(sorted(FAMILIES))}"
        )
    method = (config.get("quantization_config") or {}).get("quant_method", "mxmoe")
    if method != "mxmoe":
        raise UserError(
            f"{config_file}: the weights are quantized already ({method}); this tool starts from 16- or 32-bit weights:"
            " take the unquantized release, or load it in transformers with dequantize=True, save_pretrained, and give"
            " that folder"
        )
    return ModelFolder(folder, family, config)


def moe_path(layer: int) -> str:
    """Path of a layer's MoE module in transformers, the same in every supported family."""
    return f"model.layers.{layer}.mlp"


def is_local(path: str) -> bool:
    """Whether ``path`` means a folder rather than a hub id, also when the folder is misspelt."""
    return path.startswith((".", "/")) or path.count("/") != 1 or Path(path).parent.is_dir()


def resolve_model(path: str) -> Path:
    """A local folder as it is; a hub id becomes its downloaded snapshot. Raises `UserError` as `open_model` does."""
    if is_local(path):
        return open_model(path).path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise UserError(
            f"model.path {path!r} is neither a folder nor a hub model that can be downloaded ({type(error).__name__});"
            " log in for a gated model, or download it elsewhere and give the folder"
        ) from error
