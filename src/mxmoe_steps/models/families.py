"""Where each supported model family keeps its expert weights, as names of checkpoint tensors.

Facts of the published checkpoints, not of the model classes: `calibrate` and `quantize` read weights straight from
safetensors and never build a model. A checkpoint has one tensor per expert and block, or, as transformers 5 may also
save it, one per layer for gate and up of all experts and one for down.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.description import EXPERT_COUNTS, check_precision, check_sizes, read_config, stated_quantization
from mxmoe_steps.models.raw import FLOATS, RawColumns, RawTensor, tensors_of
from mxmoe_steps.models.sources.format import SourceFormat
from mxmoe_steps.models.sources.formats import source_formats
from mxmoe_steps.models.sources.tensor import Dequantized
from mxmoe_steps.models.stored import StoredTensors
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

Parameter = Literal["weight", "bias"]

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu")  # `mxmoe_steps.models.gating` computes them

# In config.json of our checkpoints; transformers quotes it where it is not registered (`models.quantizer`)
EXPERTS_IMPLEMENTATION = "mxmoe_steps: pip install mxmoe-steps, and import mxmoe_steps before loading the model"

_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
_COMPANIONS = (
    "generation_config.json", "*processor_config.json", "LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*",
    "USAGE_POLICY*",
)  # fmt: skip
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
    """Where a checkpoint keeps a linear block's weight or bias: in a tensor of its own, or in one of all experts.

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
        return int(next(self.config[key] for key in EXPERT_COUNTS if key in self.config))

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: token ids are below it."""
        name = "model.embed_tokens.weight"
        shape = self.raw(name).shape
        if len(shape) != 2:
            raise UserError(f"{self.path}: {name} is {list(shape)} in the checkpoint, and no matrix; download it again")
        return shape[0]

    @property
    def is_packed(self) -> bool:
        """Whether `quantize` wrote the folder."""
        return (self.config.get("quantization_config") or {}).get("quant_method") == "mxmoe"

    @cached_property
    def formats(self) -> list[SourceFormat]:
        """How the publisher quantized weights; none where they are in 16 or 32 bits, or packed by `quantize`."""
        stated = stated_quantization(self.config)
        return [] if stated is None or self.is_packed else source_formats(stated, self.path / "config.json")

    @property
    def activation(self) -> str:
        """Name of the activation between gate and down, e.g. ``silu``."""
        return str(self.config.get("hidden_act", "silu"))

    @cached_property
    def stored(self) -> StoredTensors:
        """The tensors of its files by their own names."""
        return StoredTensors(self.path, self.formats, self._stated_dtype or "bfloat16")

    @property
    def _stored(self) -> dict[str, Path]:
        return self.stored.files

    @cached_property
    def _bare(self) -> bool:
        """Whether names lack ``model.``, as where the decoder was saved without its head; transformers adds it, too."""
        return not any(name.startswith("model.") for name in self._stored)

    def stored_name(self, name: str) -> str:
        """The checkpoint's own name of a tensor in `files`."""
        return name.removeprefix("model.") if self._bare else name

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name in the causal language model -> safetensors file."""
        bare = {name for name in self._stored if self._bare and not name.startswith("lm_head.")}
        return {f"model.{name}" if name in bare else name: file for name, file in self._stored.items()}

    @property
    def dtype(self) -> str:
        """The checkpoint's own precision, which is dtype ``auto`` of transformers, e.g. ``bfloat16``.

        That of the first tensor of a floating type where ``config.json`` names none.
        """
        if self._stated_dtype or self.formats:
            return self._stated_dtype or "bfloat16"
        stored = tensors_of(min(self.files.values()))
        return next((FLOATS[stored[name].dtype] for name in sorted(stored) if stored[name].dtype in FLOATS), "float32")

    @property
    def _stated_dtype(self) -> str | None:
        stated = self.config.get("dtype", self.config.get("torch_dtype"))
        return None if stated is None else str(stated)

    @cached_property
    def moe_layers(self) -> list[int]:
        """Indices of the decoder layers that have experts."""
        if self.is_packed:
            return sorted(map(int, self.config["quantization_config"]["blocks"]))
        inside = re.compile(rf"model\.layers\.(\d+)\.(?:mlp|{self.family.moe})\.experts\.")
        layers = {int(match[1]) for match in map(inside.match, self.files) if match}
        found = sorted(layers & set(range(int(self.config["num_hidden_layers"]))))
        if not found:
            raise UserError(self._no_experts())
        return found

    def _no_experts(self) -> str:
        """What to say of a checkpoint without the expected names: perhaps it has them under another prefix."""
        inner = self.block_name(0, 0, "gate").removeprefix("model.layers.0")
        stacked = self.place(0, 0, "gate").tensor.removeprefix("model.layers.0")
        for name in self._stored:
            prefix, layers, rest = name.partition("layers.")
            if layers and prefix not in ("model.", "") and rest.lstrip("0123456789") in (inner, stacked):
                return (
                    f"{self.path}: its tensors are named like {name}, but transformers' model of this model_type takes"
                    " the names model.layers.* or layers.*; take a release of the text model, or rename them"
                )
        return f"{self.path}: no tensor named like {self.place(0, 0, 'gate').tensor}; is it an MoE model?"

    def block_name(self, layer: int, expert: int, block: str) -> str:
        """Checkpoint name of one linear block's weight, [out_features, in_features]."""
        inner = self.family.shared if expert == SHARED else f"experts.{expert}"
        return f"model.layers.{layer}.{self.family.moe}.{inner}.{self.family.blocks[BLOCKS.index(block)]}.weight"

    def place(self, layer: int, expert: int, block: str, parameter: Parameter = "weight") -> Place:
        """Where the block's weight, or its bias in a family that has them, is."""
        name = self.block_name(layer, expert, block)
        stacked = f"{moe_path(layer)}.experts.{'down_proj' if block == 'down' else 'gate_up_proj'}"
        if self.family.interleaved:
            return Place(stacked if parameter == "weight" else f"{stacked}_bias", expert, block, interleaved=True)
        if name in self.files or stacked not in self.files or expert == SHARED:
            return Place(name)
        return Place(stacked, expert, block)

    def raw_block(self, layer: int, expert: int, block: str, parameter: Parameter = "weight") -> RawTensor:
        """The block's weight or bias as bytes of its file."""
        place = self.place(layer, expert, block, parameter)
        tensor = self.raw(place.tensor)
        return tensor.view(place.read) if isinstance(tensor, Dequantized) else place.raw(tensor)

    def raw(self, name: str) -> RawTensor:
        """A tensor as bytes of its file, dequantized where it must be; `UserError` unless it is there."""
        if name not in self.files:
            raise UserError(f"{self.path}: the checkpoint holds no weights for {name}; download it again")
        return self.stored.raw(self.stored_name(name))

    @property
    def sources(self) -> list[Path]:
        """The files that decide what the model computes."""
        return sorted({*self.stored.listed.values(), self.path / "config.json"})

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files that decide how text becomes tokens, and conversations text."""
        return sorted(file for pattern in _TOKENIZER_FILES for file in self.path.glob(pattern) if file.is_file())

    @property
    def code_files(self) -> list[Path]:
        """Python files that come with the model."""
        return sorted(self.path.glob("*.py"))

    def copied_files(self, code: bool) -> list[Path]:
        """What `quantize` copies as it is, with or without `code_files`."""
        return [
            *self.tokenizer_files,
            *sorted(file for pattern in _COMPANIONS for file in self.path.glob(pattern) if file.is_file()),
            *(self.code_files if code else []),
        ]

    def expert_ids(self) -> list[int]:
        """Routed experts, then the shared one (`SHARED`) where the family has it."""
        shared = [SHARED] if self.family.shared is not None else []
        return [*range(self.experts), *shared]


def open_model(path: str | Path) -> ModelFolder:
    """Read a local model folder's ``config.json``; `UserError` for a missing, broken or unsupported model."""
    folder = Path(path)
    config = read_config(folder)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UserError(
            f"{folder}/config.json: model_type {config.get('model_type')!r} is not supported;"
            f" supported are {', '.join(sorted(FAMILIES))}"
        )
    check_precision(folder, config)
    check_sizes(folder, config)
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS and not family.clamped:
        raise UserError(
            f"{folder}/config.json: hidden_act {activation!r} is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    return ModelFolder(folder, family, config)


def open_original(path: str | Path) -> ModelFolder:
    """`open_model` of a model to quantize; `UserError` also for one that `quantize` wrote."""
    folder = open_model(path)
    if folder.is_packed:
        raise UserError(
            f"{folder.path}/config.json: the weights are quantized already (mxmoe, by this tool); set model.path to the"
            " original model"
        )
    return folder


def moe_path(layer: int) -> str:
    """Path of a layer's MoE module in transformers, the same in every supported family."""
    return f"model.layers.{layer}.mlp"


def is_local(path: str) -> bool:
    """Whether ``path`` means a folder rather than a hub id, also when the folder is misspelt."""
    return path.startswith((".", "/")) or path.partition("@")[0].count("/") != 1 or Path(path).parent.is_dir()


def describe_model(path: str) -> tuple[str, ModelFolder]:
    """A model to quantize as far as its ``config.json``, and how to name it so that it stays the same.

    That is a hub id with the commit that it is at now, and the path of a local folder. Raises `UserError` as
    `open_original` does, and for what cannot be downloaded.
    """
    if is_local(path):
        return path, open_original(path)
    from mxmoe_steps.models.hub import described

    folder = described(path, open_original)
    return f"{path.partition('@')[0]}@{folder.name}", open_original(folder)


def resolve_model(path: str, packed: bool = False, code: bool = False) -> Path:
    """A local folder as it is; a hub id, or id@revision, becomes its downloaded snapshot.

    ``code``: with the Python files that come with the model. Raises `UserError` as `open_model` does, and, unless
    ``packed`` says that they will do, for weights that `quantize` wrote.
    """
    check = open_model if packed else open_original
    if is_local(path):
        return check(path).path
    from mxmoe_steps.models.hub import download

    return download(path, check, code)
