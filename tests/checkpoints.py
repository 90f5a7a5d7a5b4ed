"""Tiny random checkpoints of every supported family."""

import re
from pathlib import Path
from typing import Any

import torch
from family_sizes import AUDIO_SIZES, FAMILY_SIZES, VISION_SIZES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mxmoe_steps import capture
from mxmoe_steps.models.adapters import FAMILIES
from mxmoe_steps.models.borders import Borders, runs_of
from mxmoe_steps.models.identity import fingerprint
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.options.shared import Waiting
from mxmoe_steps.schemes import BLOCKS, SHARED

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_STACKED = ("qwen3_5_moe", "qwen3_vl_moe")  # published so, and saved otherwise by transformers


def make_model(family: str, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    """A random model whose experts, norms, biases and router corrections all matter."""
    torch.manual_seed(0)
    sizes, kind = SIZES | FAMILY_SIZES[family] | extra, AutoModelForCausalLM
    if family in VISION_SIZES:
        sizes, kind = {"text_config": sizes, "vision_config": VISION_SIZES[family]}, AutoModelForImageTextToText
        if family in AUDIO_SIZES:
            out = {"adapter_out_dim": sizes["text_config"]["hidden_size"]}
            sizes |= {"vision_config": VISION_SIZES[family] | out, "audio_config": AUDIO_SIZES[family] | out}
        sizes["tie_word_embeddings"] = sizes["text_config"]["tie_word_embeddings"]
    model: Any = kind.from_config(AutoConfig.for_model(family, **sizes), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            elif re.search(r"norm\w*\.weight$|scale$", name):
                parameter.uniform_(0.9, 1.1)
            else:
                parameter.normal_(0, 0.02)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.normal_(0, 0.02)
    return model.eval()


def name_as_published(family: str, path: Path) -> None:
    """What transformers does not undo when it saves kimi_k25: layers have the name of those that see, and a norm the
    path of its module."""
    if family != "kimi_k25":
        return

    def published(text: str) -> str:
        return text.replace("language_model.model.blocks.", "language_model.model.layers.").replace(
            "model.mm_projector.", "mm_projector."
        )

    for file in path.glob("*.safetensors"):
        tensors = {published(name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    for index in path.glob("*.index.json"):
        index.write_text(published(index.read_text()))


def make_checkpoint(family: str, path: Path, **extra: Any) -> None:
    """The same, saved in shards as its family publishes them."""
    model = make_model(family, **extra)
    model.save_pretrained(path, max_shard_size="100KB", save_original_format=family not in _STACKED)
    name_as_published(family, path)
    if family == "qwen3_vl_moe":  # transposed, which transformers undoes
        for file in path.glob("*.safetensors"):
            tensors = load_file(file)
            for name in tensors:
                if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                    tensors[name] = tensors[name].transpose(1, 2).contiguous()
            save_file(tensors, file, metadata={"format": "pt"})


def moe_of(model: Any, family: str, layer: int) -> Any:
    """A layer's MoE module, or the layer where experts are its own."""
    return model.get_submodule(FAMILIES[family].moe_path(layer))


def block_weight(moe: Any, family: str, expert: int, block: str) -> torch.Tensor:
    """A view of one block's weight [N, K] inside the whole layer."""
    if expert == SHARED:
        return getattr(getattr(moe, str(FAMILIES[family].shared)), f"{block}_proj").weight
    if family == "nemotron_h":
        return getattr(moe.experts, f"{block}_proj")[expert]
    down, gate_up = moe.experts.down_proj[expert], moe.experts.gate_up_proj[expert]
    if family == "gpt_oss":
        return (down if block == "down" else gate_up[:, BLOCKS.index(block) :: 2]).T
    if FAMILIES[family].orientation == "columns":
        return (down if block == "down" else gate_up.chunk(2, -1)[BLOCKS.index(block)]).T
    if block == "down":
        return down
    return gate_up.chunk(2)[BLOCKS.index(block)]


def capture_tokens(checkpoint: Path, tokens: torch.Tensor, out: Path, batch: int = 2) -> dict[int, dict[str, Any]]:
    """What `capture` writes for tokens instead of a text, by layer; ``out`` keeps its files."""
    model = StreamedModel(checkpoint, "float32", "cpu")
    options = Waiting(out=out, borders=out)
    borders = Borders(model, tokens, "mxmoe_steps.capture", options)
    runs = runs_of([len(tokens)], batch)
    facts = {"text": "random", "model": fingerprint(model.folder)}
    facts |= dict(zip(("sequences", "length"), tokens.shape, strict=True))
    capture.capture_backward(model, borders, runs, 0, facts, seed=2)
    return {layer: load_file(out / f"layer-{layer:03d}.safetensors") for layer in model.folder.moe_layers}
