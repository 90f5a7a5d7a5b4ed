"""What a checkpoint must be before anything is computed: whole, in a floating type, with nothing that alters it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, make_model, name_as_published
from packed import pack
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.adapters import FAMILIES
from mxmoe_steps.models.families import open_model, resolve_model
from mxmoe_steps.models.streaming import StreamedModel

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj"


def rewritten(source: Path, out: Path, change: Callable[[Tensors], Tensors | None], **config: Any) -> Path:
    """A copy in one file whose tensors and configuration are changed; a value of None removes a key."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {
        name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    values = json.loads((out / "config.json").read_text()) | config
    values = {key: value for key, value in values.items() if value is not None}
    (out / "config.json").write_text(json.dumps(values))
    return out


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3") / "model"
    make_checkpoint("qwen3_moe", path)
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tied") / "model"
    make_checkpoint("qwen3_moe", path, tie_word_embeddings=True)
    return path


def experts_as(dtype: torch.dtype, scale: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        found = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
        scaled = {name: (tensor * 100).round().to(dtype) for name, tensor in found.items()}
        return tensors | scaled | {name.replace("weight", scale): torch.ones(1) for name in found}

    return change


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def added(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(shape)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (experts_as(torch.float8_e4m3fn, "weight_scale_inv"), r"experts.*weight is stored as F8_E4M3: the weights are"),
        (experts_as(torch.int8, "weight_scale"), r"experts.*weight is stored as I8: .*quantized already"),
        (
            experts_as(torch.bfloat16, "weight_scale"),
            r"weight_scale belongs to the weights .*mean something",
        ),
        (added("model.layers.1.mlp.experts.2.up_proj_scale", 1), r"up_proj_scale belongs to the weights"),
        (added(f"{QUERY}.bias", 64), r"q_proj\.bias belongs to the weights"),
        (added(f"{QUERY}.lora_A.weight", 4, 64), r"lora_A\.weight belongs to the weights"),
        (without("lm_head.weight"), r"no weights for lm_head\.weight; set tie_word_embeddings"),
        (without("model.norm.weight"), r"no weights for model\.norm\.weight"),
        (without(UP), r"no weights for layer 1, expert 2, up \(model\.layers\.1"),
        (without("model.layers.1.mlp.experts.0.gate_proj.weight"), r"no weights for layer 1, expert 0, gate"),
        (lambda tensors: tensors | {UP: torch.zeros(7, 7)}, r"layers\.1\.mlp\.experts\.gate_up_proj do not fit"),
        (lambda tensors: tensors | {"lm_head.weight": torch.ones(9, 64)}, r"lm_head\.weight is \[9, 64\].*\[96, 64\]"),
        (added("model.layers.0.mlp.experts.4.gate_proj.weight", 96, 64), r"experts\.gate_up_proj do not fit"),
        (renamed("model.", "model.language_model."), r"named like model\.language_model\.layers\.0.*rename them"),
        (renamed("model.", "language_model.model."), r"named like language_model\.model\.layers\.0.*rename them"),
    ],
)
def test_what_would_be_computed_with_other_weights_is_refused(
    qwen: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        StreamedModel(rewritten(qwen, tmp_path / "model", change), "float32", "cpu")


@pytest.mark.parametrize(
    "change",
    [
        added("model.layers.0.self_attn.rotary_emb.inv_freq", 16),
        added("model.layers.0.self_attn.k_scale", 1),  # of a key-value cache
        added("mtp.layers.0.mlp.experts.0.up_proj.weight", 96, 64),
        added("model.layers.2.mlp.experts.0.up_proj.weight_scale_inv", 1),  # of a layer that only predicts tokens ahead
        lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
    ],
)
def test_tensors_that_the_model_does_not_use_are_harmless(
    qwen: Path, tmp_path: Path, change: Callable[[Tensors], Tensors]
) -> None:
    StreamedModel(rewritten(qwen, tmp_path / "model", change), "float32", "cpu")


def test_names_of_a_decoder_without_its_head_are_taken_as_transformers_takes_them(qwen: Path, tmp_path: Path) -> None:
    bare = rewritten(qwen, tmp_path / "bare", renamed("model.", ""))
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected, loaded = (AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (qwen, bare))
    assert torch.equal(loaded, expected)
    models = [StreamedModel(path, "float32", "cpu") for path in (qwen, bare)]
    assert set(models[0].folder.files) == set(models[1].folder.files)
    outputs = []
    for model in models:
        with model.loaded("model.embed_tokens", "model.layers.0"):
            outputs.append(model.run_layer(0, model.embed(tokens)))
    assert torch.equal(*outputs)
    schemes = ("w4a16", "w16a16", "w8a8")
    packed = [pack(path, tmp_path / f"of-{path.name}", lambda *_: schemes) for path in (qwen, bare)]
    first, second = (load_file(path / "model.safetensors") for path in packed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_tied_head_may_be_absent(tied: Path, tmp_path: Path) -> None:
    path = rewritten(tied, tmp_path / "model", without("lm_head.weight"))
    assert "lm_head.weight" not in StreamedModel(path, "float32", "cpu").folder.files
    with pytest.raises(UserError, match=r"no weights for .*model\.embed_tokens\.weight; download"):
        StreamedModel(rewritten(tied, tmp_path / "other", without("model.embed_tokens.weight")), "float32", "cpu")


def test_one_file_comes_before_an_index_as_in_transformers(qwen: Path, tmp_path: Path) -> None:
    """A folder with shards of one model, and beside them a file of another."""
    shutil.copytree(qwen, tmp_path / "both")
    other = rewritten(qwen, tmp_path / "other", lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    shutil.copyfile(other / "model.safetensors", tmp_path / "both" / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "both").lm_head.weight
    model = StreamedModel(tmp_path / "both", "float32", "cpu")
    with model.loaded("lm_head"):
        assert torch.equal(model.model.lm_head.weight, expected)
    assert open_model(tmp_path / "both").files["lm_head.weight"].name == "model.safetensors"


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_is_the_dtype_of_transformers(qwen: Path, tmp_path: Path, stored: torch.dtype) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {name: tensor.to(stored) for name, tensor in tensors.items()}

    for name, stated in (("silent", None), ("stated", "bfloat16")):
        path = rewritten(qwen, tmp_path / name, change, dtype=stated)
        expected = AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype
        assert StreamedModel(path, "auto", "cpu").dtype == expected
        assert f"torch.{open_model(path).dtype}" == str(expected)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"model_type": "qwen3_moe", "num', r"config\.json: not readable as JSON"),
        ("", r"config\.json: not readable as JSON"),
        ("[]", r"config\.json: must hold a JSON object, found list"),
        ("null", r"config\.json: must hold a JSON object, found NoneType"),
        ("[" * 100_000, r"config\.json: not readable as JSON"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=says):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"num_experts": None}, r"num_experts must be a positive whole number, found None"),
        ({"num_experts": "4"}, r"num_experts must be a positive whole number, found '4'"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok must be a positive whole number, found 0"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok is 5, but there are only 4 experts"),
        ({"num_hidden_layers": True}, r"num_hidden_layers must be a positive whole number, found True"),
        ({"hidden_size": 64.0}, r"hidden_size must be a positive whole number"),
        ({"hidden_act": "tanh"}, r"hidden_act 'tanh' is not supported; known: silu"),
        ({"hidden_act": ["silu"]}, r"hidden_act \['silu'\] is not supported"),
        ({"model_type": ["qwen3_moe"]}, r"model_type \['qwen3_moe'\] is not supported"),
        ({"quantization_config": {}}, r"quantization_config names no quant_method"),
        ({"quantization_config": []}, r"quantization_config names no quant_method"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"the weights are quantized already \(gptq\)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, r"quantized already \(compressed-tensors\)"),
    ],
)
def test_an_odd_configuration_is_refused(qwen: Path, tmp_path: Path, edit: dict[str, Any], says: str) -> None:
    values = json.loads((qwen / "config.json").read_text()) | edit
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=says):
        open_model(tmp_path)


def test_what_transformers_cannot_build_is_refused(qwen: Path, tmp_path: Path) -> None:
    path = rewritten(qwen, tmp_path / "model", lambda _: None, num_attention_heads="two")
    with pytest.raises(UserError, match=r"config\.json: transformers builds no model from it: .*num_attention_heads"):
        StreamedModel(path, "float32", "cpu")


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_quantizers_own_file_is_believed(qwen: Path, tmp_path: Path, name: str) -> None:
    path = rewritten(qwen, tmp_path / "model", lambda _: None)
    (path / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name}: the weights are quantized already"):
        resolve_model(str(path))


def test_a_packed_model_is_not_packed_again(qwen: Path, tmp_path: Path) -> None:
    packed = {"quant_method": "mxmoe", "version": 1, "schemes": ["w4a16_g128_asym"], "blocks": {"0": {"0": [0, 0, 0]}}}
    path = rewritten(qwen, tmp_path / "model", lambda _: None, quantization_config=packed)
    with pytest.raises(UserError, match=r"quantized already \(mxmoe, by this tool\); set model\.path to the original"):
        resolve_model(str(path))
    assert resolve_model(str(path), packed=True) == path


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("", "not readable as JSON"),
        ("{}", "weight_map must be an object"),
        ('{"weight_map": ["a"]}', "weight_map must be an object"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "no safetensors file inside the folder"),
        ('{"weight_map": {"a": "/tmp/model.safetensors"}}', "no safetensors file inside the folder"),
        ('{"weight_map": {"a": 3}}', "names 3, which is no safetensors file"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "no safetensors file"),
        ('{"weight_map": {"a": "lost.safetensors"}}', r"lost\.safetensors: missing, though the checkpoint's index"),
    ],
)
def test_a_broken_index_is_named(qwen: Path, tmp_path: Path, index: str, says: str) -> None:
    shutil.copy(qwen / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=says):
        _ = open_model(tmp_path).files


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_passes_in_one_file(family: str, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path)
    name_as_published(family, tmp_path)
    StreamedModel(tmp_path, "auto", "cpu")


class Hub:
    """A repository of the hub: what is asked for lands in the folder of its commit."""

    def __init__(self, files: dict[str, Path], folder: Path) -> None:
        self.files, self.folder, self.got = files, folder, set[str]()
        self.revisions: list[str | None] = []

    def snapshot_download(
        self,
        repo: str,
        revision: str | None = None,
        allow_patterns: list[str] | None = None,
        ignore_patterns: list[str] | None = None,
    ) -> str:
        from huggingface_hub.utils import filter_repo_objects

        assert repo == "org/name"
        self.revisions.append(revision)
        wanted = filter_repo_objects(self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in wanted:
            self.got.add(name)
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.files[name], self.folder / name)
        return str(self.folder)


@pytest.mark.parametrize("code", [False, True])
def test_a_hub_model_is_what_its_index_names(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: bool
) -> None:
    files = {file.name: file for file in qwen.iterdir()}
    weights = {name for name in files if name.endswith(".safetensors")}
    extra = ["consolidated.safetensors", "onnx/model.safetensors", "original/config.json", "pytorch_model.bin", "m.py"]
    hub = Hub(files | dict.fromkeys(extra, qwen / "config.json"), tmp_path / "abc123")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    path = resolve_model("org/name@v1", code=code)
    assert len(weights) > 2
    assert hub.got == {*files, *(["m.py"] if code else [])}
    assert hub.revisions[0] == "v1"
    assert set(hub.revisions[1:]) == {"abc123"}, "whatever the branch does meanwhile"
    StreamedModel(path, "float32", "cpu")


def test_what_is_no_hub_id_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"'no such/model' is neither a folder nor a hub model .*name@revision"):
        resolve_model("no such/model")
