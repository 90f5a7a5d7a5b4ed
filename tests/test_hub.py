"""Models of a hub: one commit throughout, its snapshot of symbolic links, gated, offline, and what is downloaded."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from checkpoints import make_checkpoint
from hub import NAME, Hub, contents, serving
from packed import pack

from mxmoe_steps.errors import UserError
from mxmoe_steps.evaluations import read_manifest
from mxmoe_steps.models.families import describe_model, open_model, resolve_model
from mxmoe_steps.models.identity import fingerprint
from mxmoe_steps.workflow.plan import pinned_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in shards, and all kinds of files around it."""
    path = tmp_path_factory.mktemp("hub") / "model"
    make_checkpoint("qwen3_moe", path)
    return path


NEEDED = [  # beside weights and configuration
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json",
    "special_tokens_map.json", "vocab.json", "vocab.bpe", "merges.txt", "qwen.tiktoken", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/rag.jinja", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "USAGE_POLICY",
]  # fmt: skip
CODE = ["modeling_name.py", "tokenization_name.py"]
OTHERS = [
    "README.md", ".gitattributes", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "figures/a.png",
    "onnx/config.json", "original/model.safetensors",
]  # fmt: skip


def surrounded(model: Path) -> dict[str, bytes]:
    """Contents of a model and of all these files."""
    names = [*NEEDED, *CODE, *OTHERS]
    return {name: f"contents of {name}".encode() for name in names} | contents(model) | {"tokenizer.json": b"{}"}


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    with serving(hub):
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.commit(surrounded(model))
        yield hub


def test_one_commit_is_downloaded_whatever_the_branch_does(hub: Hub, model: Path, tmp_path: Path) -> None:
    first = hub.branches["main"]
    pinned, described = describe_model(NAME)
    assert pinned == f"{NAME}@{first}"
    assert not list(described.path.glob("*.safetensors")), "a plan needs no weights"
    hub.commit(surrounded(model) | {"LICENSE": b"another"})

    folder = resolve_model(pinned)
    assert folder.name == first
    assert set(contents(folder)) == {*NEEDED, *contents(model)}
    assert all(file.is_symlink() for file in folder.iterdir() if file.is_file())
    assert fingerprint(open_model(folder)) == fingerprint(open_model(model))
    assert set(contents(resolve_model(pinned, code=True))) == {*NEEDED, *CODE, *contents(model)}
    assert (resolve_model(NAME) / "LICENSE").read_bytes() == b"another"

    packed = pack(Path(folder), tmp_path / "packed", lambda *_: ("w4a16", "w8a16", "w16a16"))
    published = read_manifest(packed)["published"]
    assert (published["name"], published["commit"]) == (NAME, first)
    for name in NEEDED:
        copy = packed / name
        assert copy.read_bytes() == (folder / name).read_bytes()
        assert not copy.is_symlink()
    assert not set(CODE) & set(contents(packed))


def test_revisions_and_the_pin_of_a_run(hub: Hub, model: Path, tmp_path: Path) -> None:
    tagged = hub.commit(surrounded(model) | {"NOTICE": b"of v1"}, branch="v1")
    main = hub.branches["main"]
    assert describe_model(f"{NAME}@v1")[0] == f"{NAME}@{tagged}"
    assert (resolve_model(f"{NAME}@v1") / "NOTICE").read_bytes() == b"of v1"
    assert resolve_model(f"{NAME}@{main}").name == main
    pin = tmp_path / "pin.json"
    assert pinned_model(NAME, pin, is_first=True)[0] == f"{NAME}@{main}"
    hub.commit(surrounded(model) | {"NOTICE": b"newer"})
    assert pinned_model(NAME, pin, is_first=False)[0] == f"{NAME}@{main}"
    with pytest.raises(UserError, match="has no revision v2; name a branch, a tag or a whole commit"):
        resolve_model(f"{NAME}@v2")


def test_a_gated_model_says_what_to_do(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(UserError, match=rf"'{NAME}' is gated: accept the terms on its page, then log in"):
        resolve_model(NAME)


def test_another_name_is_said(hub: Hub) -> None:
    with pytest.raises(UserError, match=r"'org/other' is neither a folder nor a hub model .*RepositoryNotFoundError"):
        resolve_model("org/other")


def test_offline_what_is_in_the_cache_is_enough_and_nothing_else(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(state: bool) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", state)

    offline(True)
    with pytest.raises(UserError, match=r"is not in the hub's cache, or not whole, and .*unset HF_HUB_OFFLINE"):
        resolve_model(NAME)
    offline(False)
    describe_model(NAME)
    offline(True)
    with pytest.raises(UserError, match="is not in the hub's cache, or not whole"):
        resolve_model(NAME)
    offline(False)
    folder = resolve_model(NAME)
    offline(True)
    hub.asked.clear()
    assert resolve_model(NAME) == folder
    assert describe_model(NAME)[0] == f"{NAME}@{folder.name}"
    assert resolve_model(f"{NAME}@{folder.name}") == folder
    assert hub.asked == []

    (tmp_path / "link").symlink_to(folder)  # as a folder of one's own
    local = open_model(resolve_model(str(tmp_path / "link")))
    assert fingerprint(local) == fingerprint(open_model(model))
    packed = pack(tmp_path / "link", tmp_path / "packed", lambda *_: ("w4a16", "w8a16", "w16a16"))
    assert read_manifest(packed)["published"]["commit"] == folder.name
    shutil.copytree(folder, tmp_path / "copy")
    again = pack(tmp_path / "copy", tmp_path / "again", lambda *_: ("w4a16", "w8a16", "w16a16"))
    assert read_manifest(again)["published"]["commit"] is None
    differing = {name for name, data in contents(packed).items() if contents(again)[name] != data}
    assert differing == {"mxmoe.json"}


def test_files_that_are_left_out_are_named(model: Path, tmp_path: Path) -> None:
    """Of a folder that holds everything, without and with the model's code."""
    folder = tmp_path / "model"
    for name, data in surrounded(model).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    packed = pack(folder, tmp_path / "packed", lambda *_: ("w4a16", "w8a16", "w16a16"))
    found = {one["name"]: (one["count"], one["why"]) for one in read_manifest(packed)["left_out"]}
    assert found == {
        "README.md": (1, "says nothing that loading or using the model needs"),
        "consolidated.safetensors": (1, "weights that transformers does not read"),
        "figures/*": (1, "a folder that transformers does not read"),
        "modeling_name.py": (1, "code that comes with the model, which model.trust_remote_code takes over"),
        "onnx/*": (2, "a folder that transformers does not read"),
        "original/*": (1, "a folder that transformers does not read"),
        "pytorch_model.bin": (1, "weights that transformers does not read"),
        "tokenization_name.py": (1, "code that comes with the model, which model.trust_remote_code takes over"),
    }
    assert json.loads((packed / "config.json").read_text())["quantization_config"]["quant_method"] == "mxmoe"
    assert set(contents(packed)) == {*NEEDED, "config.json", "model.safetensors", "mxmoe.json"}
