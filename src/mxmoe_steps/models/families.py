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
from typing import Any, Literal

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.raw import RawColumns, RawTensor, tensors_of
from mxmoe_steps.schemes import BLOCKS, SHARED


@dataclass(frozen=True)
class Family:
    """Tensor names of one ``model_type``.

    ``moe`` is the MoE module of a layer inside the checkpoint; ``blocks`` the names of gate, up and
    down there; ``shared`` the shared expert's module, ``shared_gate`` its sigmoid gate. ``interleaved``: the
    checkpoint stacks experts, transposed, with a column of up after each of gate (see `Place`); ``biased``: their
    blocks have biases; ``clamped``: their gate and up are clamped (see `mxmoe_steps.models.gating.Gating`).
    """

    moe: str = "mlp"
    blocks: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str | None = None
    shared_gate: str | None = None
    interleaved: bool = False
    biased: bool = False
    clamped: bool = False


PACKED_MODULES = ("mxmoe_steps.models.quantizer",)  # what a model that is not packed never runs

Part = Literal["weight", "bias"]

# In config.json of our checkpoints; transformers quotes it where it is not registered (`models.quantizer`)
EXPERTS_IMPLEMENTATION = "mxmoe_steps: pip install mxmoe-steps, and import mxmoe_steps before loading the model"

_DEQUANTIZING = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}  # method -> its transformers configuration

_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
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
    "gpt_oss": Family(interleaved=True, biased=True, clamped=True),
}


@dataclass(frozen=True)
class Place:
    """Where a checkpoint keeps a part of one linear block: in a tensor of its own, or in one of all experts.

    The latter are ``gate_up_proj`` [E, 2I, H], gate's rows before up's, and ``down_proj`` [E, H, I]. Where they are
    ``interleaved`` they are ``gate_up_proj`` [E, H, 2I], whose even columns are gate's and odd ones up's, and
    ``down_proj`` [E, I, H], with biases [E, 2I] and [E, H].
    """

    tensor: str
    expert: int | None = None
    block: str = ""
    interleaved: bool = False

    def read(self, stored: Any) -> Any:
        """The block's weight [N, K] or bias [N] from safetensors' unread slice of its tensor."""
        if self.expert is None:
            return stored[...]
        if not self.interleaved:
            return stored[self.expert, self._rows(stored.get_shape()[1])]
        first, step = self._columns()
        return stored[self.expert][..., first::step].movedim(-1, 0)

    def raw(self, source: RawTensor) -> RawTensor:
        """The same as bytes of its tensor's file."""
        if self.expert is None:
            return source
        experts, *shape = source.shape
        size = source.nbytes // experts
        start = source.start + self.expert * size
        if self.interleaved:
            first, step = self._columns()
            *inputs, columns = shape
            outputs = columns // step
            return RawColumns(source.file, source.dtype, (outputs, *inputs), start, start + size, first, step)
        total, in_features = shape
        rows = self._rows(total)
        row_bytes = size // total
        start, stop = start + rows.start * row_bytes, start + rows.stop * row_bytes
        return RawTensor(source.file, source.dtype, (rows.stop - rows.start, in_features), start, stop)

    def _rows(self, total: int) -> slice:
        """The block's rows among those of its expert."""
        if self.block == "down":
            return slice(0, total)
        return slice(0, total // 2) if self.block == "gate" else slice(total // 2, total)

    def _columns(self) -> tuple[int, int]:
        """First and step of the block's columns among those of its expert."""
        return (0, 1) if self.block == "down" else (BLOCKS.index(self.block), 2)


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
            raise UserError(f"{self.path}: no tensor named like {self.place(0, 0, 'gate').tensor}; is it an MoE model?")
        return found

    def block_name(self, layer: int, expert: int, block: str) -> str:
        """Checkpoint name of one linear block's weight, [out_features, in_features]."""
        inner = self.family.shared if expert == SHARED else f"experts.{expert}"
        return f"model.layers.{layer}.{self.family.moe}.{inner}.{self.family.blocks[BLOCKS.index(block)]}.weight"

    def place(self, layer: int, expert: int, block: str, part: Part = "weight") -> Place:
        """Where the block's weight, or its bias in a family that has them, is."""
        name = self.block_name(layer, expert, block)
        stacked = f"{moe_path(layer)}.experts.{'down_proj' if block == 'down' else 'gate_up_proj'}"
        if self.family.interleaved:
            return Place(stacked if part == "weight" else f"{stacked}_bias", expert, block, interleaved=True)
        if name in self.files or stacked not in self.files or expert == SHARED:
            return Place(name)
        return Place(stacked, expert, block)

    def raw_block(self, layer: int, expert: int, block: str, part: Part = "weight") -> RawTensor:
        """The block's weight or bias as bytes of its file."""
        place = self.place(layer, expert, block, part)
        return place.raw(tensors_of(self.files[place.tensor])[place.tensor])

    @property
    def sources(self) -> list[Path]:
        """The files that decide what the model computes."""
        return sorted({*self.files.values(), self.path / "config.json"})

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files that decide how text becomes tokens, and conversations text."""
        return sorted(file for pattern in _TOKENIZER_FILES for file in self.path.glob(pattern) if file.is_file())

    @property
    def copied_files(self) -> list[Path]:
        """What `quantize` copies as it is."""
        return [*self.tokenizer_files, *self.path.glob("generation_config.json")]

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
        fix = "take a release that has them"
        if method in _DEQUANTIZING:
            fix += (
                f", or dequantize it with transformers: from_pretrained({str(folder)!r},"
                f" quantization_config={_DEQUANTIZING[method]}(dequantize=True)), then"
                " save_pretrained(FOLDER, save_original_format=False), and give that folder"
            )
        raise UserError(
            f"{config_file}: the weights are quantized already ({method}); this tool starts from 16- or 32-bit weights:"
            f" {fix}"
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
        open_model(snapshot_download(path, allow_patterns=["config.json"]))  # what is refused is not downloaded
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise UserError(
            f"model.path {path!r} is neither a folder nor a hub model that can be downloaded ({type(error).__name__});"
            " log in for a gated model, or download it elsewhere and give the folder"
        ) from error
