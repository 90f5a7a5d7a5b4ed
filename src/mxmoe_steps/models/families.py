"""A checkpoint folder: its family, its files, and where its expert weights are in them.

A checkpoint has one tensor per expert and block, or one per layer for gate and up of all experts and one for down.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.adapters import Family, family_of
from mxmoe_steps.models.description import (
    EXPERT_COUNTS,
    check_precision,
    check_sizes,
    layer_count,
    read_config,
    stated_quantization,
)
from mxmoe_steps.models.places import Place
from mxmoe_steps.models.raw import FLOATS, RawTensor, tensors_of
from mxmoe_steps.models.sources.format import SourceFormat
from mxmoe_steps.models.sources.formats import source_formats
from mxmoe_steps.models.sources.tensor import Dequantized
from mxmoe_steps.models.stored import StoredTensors
from mxmoe_steps.schemes import BLOCKS, SHARED

PACKED_MODULES = ("mxmoe_steps.models.quantizer",)  # what a model that is not packed never runs

Parameter = Literal["weight", "bias"]

ACTIVATIONS = (
    "silu",
    "swish",
    "gelu",
    "gelu_pytorch_tanh",
    "relu",
    "relu2",
)  # `mxmoe_steps.models.gating` computes them

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


@dataclass(frozen=True)
class ModelFolder:
    """A local checkpoint folder and what its ``config.json`` says about experts."""

    path: Path
    family: Family
    config: dict[str, Any]

    @property
    def text(self) -> Mapping[str, Any]:
        """What ``config.json`` says of the language model."""
        return self.family.text(self.config)

    @property
    def experts(self) -> int:
        """Routed experts per layer."""
        return int(next(self.text[key] for key in EXPERT_COUNTS if key in self.text))

    @property
    def layers(self) -> int:
        """Decoder layers, with experts or without."""
        return layer_count(self.text)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: token ids are below it."""
        name = f"{self.family.decoder}.{self.family.stored_embedding or self.family.embedding}.weight"
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

    @cached_property
    def stored(self) -> StoredTensors:
        """The tensors of its files by their own names."""
        return StoredTensors(self.path, self.formats, self._stated_dtype or "bfloat16")

    @property
    def _stored(self) -> dict[str, Path]:
        return self.stored.files

    @cached_property
    def _stored_names(self) -> dict[str, str]:
        """Name in `files` -> the checkpoint's own."""
        prefix = self.family.prefix_of(self._stored)
        return {self.family.own_name(name, prefix): name for name in self._stored}

    def stored_name(self, name: str) -> str:
        """The checkpoint's own name of a tensor in `files`."""
        return self._stored_names[name]

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> safetensors file; names of the decoder begin with its path in transformers."""
        return {name: self._stored[stored] for name, stored in self._stored_names.items()}

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
        configs = (self.config, self.text)
        stated = next((said[key] for said in configs for key in ("dtype", "torch_dtype") if said.get(key)), None)
        return None if stated is None else str(stated)

    @cached_property
    def moe_layers(self) -> list[int]:
        """Indices of the decoder layers that have experts."""
        if self.is_packed:
            return sorted(map(int, self.config["quantization_config"]["blocks"]))
        inside = re.compile(self._in_layers(r"(\d+)", ("experts.", *self.family.stacked)))
        layers = {int(match[1]) for match in map(inside.match, self.files) if match}
        found = sorted(layers & set(range(self.layers)))
        if not found:
            raise UserError(self._no_experts())
        return found

    def _in_layers(self, layer: str, names: Iterable[str]) -> str:
        """Pattern of tensors below the MoE module of a layer, as transformers and as the publisher calls it."""
        modules = {re.escape(f"{module}.") if module else "" for module in (self.family.moe, self._stored_moe)}
        inner = "|".join(map(re.escape, names))
        return rf"{re.escape(self.family.decoder)}\.layers\.{layer}\.(?:{'|'.join(sorted(modules))})(?:{inner})"

    @property
    def _stored_moe(self) -> str:
        return self.family.moe if self.family.stored_moe is None else self.family.stored_moe

    def _no_experts(self) -> str:
        """What to say of a checkpoint without the expected names: perhaps it has them under another prefix."""
        layer = self.family.layer_path(0)
        inner = self.block_name(0, 0, "up").removeprefix(layer)
        stacked = self.place(0, 0, "up").tensor.removeprefix(layer)
        for name in self._stored:
            prefix, layers, rest = name.partition("layers.")
            if layers and prefix not in self.family.prefixes and rest.lstrip("0123456789") in (inner, stacked):
                taken = " or ".join(f"{known}layers.*" for known in self.family.prefixes)
                return (
                    f"{self.path}: its tensors are named like {name}, but transformers' model of this model_type takes"
                    f" the names {taken}; take a release of the text model, or rename them"
                )
        return f"{self.path}: no tensor named like {self.place(0, 0, 'up').tensor}; is it an MoE model?"

    def block_name(self, layer: int, expert: int, block: str) -> str:
        """Checkpoint name of one linear block's weight, [out_features, in_features]."""
        moe = f"{self.family.layer_path(layer)}." + (f"{self._stored_moe}." if self._stored_moe else "")
        if expert == SHARED:
            return f"{moe}{self.family.stored_shared or self.family.shared}.{block}_proj.weight"
        return f"{moe}experts.{expert}.{self.family.blocks[BLOCKS.index(block)]}.weight"

    def place(self, layer: int, expert: int, block: str, parameter: Parameter = "weight") -> Place:
        """Where the block's weight, or its bias in a family that has them, is."""
        gated = self.family.gated
        name = self.block_name(layer, expert, block if block in self.family.own_blocks else "up")
        if name in self.files or expert == SHARED:
            return Place(name, block=block, gated=gated)
        stacked, orientation = self._stacked(layer, block)
        if self.family.biased:
            return Place(stacked if parameter == "weight" else f"{stacked}_bias", expert, block, orientation)
        return Place(stacked, expert, block, orientation, gated) if stacked in self.files else Place(name)

    def _stacked(self, layer: int, block: str) -> tuple[str, str]:
        """Name and orientation of the tensor of a block of all experts, as published or as transformers 5 saves it."""
        names = (self.family.stacked, ("experts.gate_up_proj", "experts.down_proj"))
        modules = (self._stored_moe, self.family.moe)
        for module, pair in zip(modules, names, strict=True):
            name = ".".join(filter(None, (self.family.layer_path(layer), module, pair[block == "down"])))
            if name in self.files:
                break
        if self.family.orientation != "either" or name not in self.files:
            return name, self.family.orientation
        _, outputs, inputs = self.raw(name).shape
        in_rows = (outputs if block == "down" else inputs) == self.text["hidden_size"]
        return name, "rows" if in_rows else "columns"

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
    family = family_of(folder, config)
    check_precision(folder, config)
    check_sizes(folder, family.text(config))
    activation = family.text(config).get(family.activation, "silu")
    if activation not in ACTIVATIONS and not family.clamped:
        raise UserError(
            f"{folder}/config.json: {family.activation} {activation!r} is not supported;"
            f" known: {', '.join(ACTIVATIONS)}"
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
