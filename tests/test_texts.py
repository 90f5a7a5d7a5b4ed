"""What text and tokenizer must be: records and chats by name, BOS as the tokenizer says, nothing degenerate."""

import csv
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mxmoe_steps import check
from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.data import tokens
from mxmoe_steps.data.parsing import parse_source
from mxmoe_steps.data.reading import TextReader, check_tokens
from mxmoe_steps.data.sources import FileText, HubText, documents
from mxmoe_steps.data.tokens import leading_tokens, sequences
from mxmoe_steps.errors import UserError

DEMO = Path(__file__).parents[1] / "resources" / "demo-moe"
TEXTS = ["one, two", 'a "quoted"\nline', "drei  vier ", "五\t六"]
CHATS = [
    [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}] for n in range(4)
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{% endif %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def demo() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def with_bos(demo: Any) -> Any:
    """The demo's tokenizer, with a BOS token that it puts before a text, and an EOS token that it puts after it."""
    backend = Tokenizer.from_str(demo.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    one, two = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", one), ("</s>", two)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def written(path: Path, values: list[Any], column: str = "body") -> str:
    """A file of records by its suffix, with a number before the column."""
    records = [{"n": n, column: value} for n, value in enumerate(values)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.writer(stream, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writerows([["n", column], *([n, value] for n, value in enumerate(values))])
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def other(tmp_path: Path) -> str:
    path = tmp_path / "other.txt"
    path.write_text("other")
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "A.JSONL", "a.txt"])
def test_records_are_read_by_the_column_that_is_named(tmp_path: Path, other: str, name: str) -> None:
    file = written(tmp_path / name, TEXTS)
    assert documents(FileText((other,), test_files=(file,), column="body"), "test") == TEXTS
    with pytest.raises(UserError, match=rf"{name}: no column 'text'; it has n, body"):
        documents(FileText((other,), test_files=(file,), column="text"), "test")
    with pytest.raises(
        UserError, match=rf"{name}: holds records, not text: .*e\.g\. `column: n` \(there are n, body\)"
    ):
        documents(FileText((other,), test_files=(file,)), "test")
    if name not in ("a.csv", "a.tsv"):  # whose values are all text
        with pytest.raises(UserError, match="column 'n' of record 1 is not text"):
            documents(FileText((other,), test_files=(file,), column="n"), "test")


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.json", "chat.parquet"])
def test_chats_are_the_messages_of_a_column(tmp_path: Path, other: str, name: str) -> None:
    sharegpt = [
        [{"from": "human", "value": turn[0]["content"]}, {"from": "gpt", "value": turn[1]["content"]}] for turn in CHATS
    ]
    for number, chats in enumerate((CHATS, sharegpt)):
        file = written(tmp_path / f"{number}{name}", chats, "messages")
        assert documents(FileText((other,), test_files=(file,), column="messages"), "test") == CHATS
        with pytest.raises(UserError, match=r"e\.g\. `column: messages`"):
            documents(FileText((other,), test_files=(file,)), "test")
    many = [[{"role": "user", "content": f"question {n}"}] for n in range(40)]
    file = written(tmp_path / f"many{name}", many, "messages")
    halves = [documents(FileText((file,), column="messages"), split) for split in ("calibration", "test")]
    assert min(map(len, halves)) > 8
    assert sorted(map(str, [*halves[0], *halves[1]])) == sorted(map(str, many))


def test_chats_of_a_hub_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"chat": CHATS}).to_parquet(tmp_path / "train.parquet")
    assert documents(HubText(str(tmp_path), column="chat", test_split="train"), "test") == CHATS
    with pytest.raises(UserError, match="cannot be joined"):
        documents(HubText(str(tmp_path), column="chat", test_split="train", join="\n"), "test")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}', r"record 2 has no column 'text', but body"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"a\.jsonl: not readable as JSON objects"),
        ("a.jsonl", '{"text": "a"}\n[1]', r"record 2 is no JSON object"),
        ("a.json", '{"data": [\n{"text": "a"}]}', r"a\.json: not readable as JSON objects"),
        ("a.json", "3", r"record 1 is no JSON object"),
        ("a.json", "[" * 100_000, r"not readable as JSON objects"),
        ("a.jsonl", '{"text": [{"role": "user"}, 3]}', r"column 'text' of record 1 is not text, and no list of chat"),
        (
            "a.jsonl",
            '{"text": [{"speaker": "me"}]}',
            r"a chat message needs role and content, both text; it has speaker",
        ),
        (
            "a.jsonl",
            '{"text": [{"from": ["me"], "value": "a"}]}',
            r"needs role and content, both text; it has from, value",
        ),
        ("a.jsonl", '{"text": "a\\ud800b"}', r"column 'text' of record 1: holds half of a surrogate pair"),
        ("a.jsonl", '{"text": "a\\u0000b"}', r"column 'text' of record 1: holds a NUL byte"),
        ("a.csv", "n,text\n1,a\n2", r"a\.csv: "),
        ("a.parquet", "PAR1", r"a\.parquet: not a readable Parquet file"),
        ("a.txt", "plain text", r"a\.txt: not readable as JSON objects"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        documents(FileText((str(tmp_path / name),), column="text"), "test")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"text\0text", r"bad: holds a NUL byte at character 4"),
        ("text".encode("utf-16"), r"bad: is UTF-16; convert it, e\.g\. iconv -f utf-16 -t utf-8"),
        (b"\x1f\x8b\x08\x00", r"bad: is a gzip file; unpack it"),
        (b"PAR1", r"bad: is a Parquet file; let its name end in \.parquet"),
        (b"%PDF-1.7", r"bad: is a PDF file"),
        (b"ab\x01\x02\x03" * 9, r"bad: 27 of 45 characters are control or replacement characters"),
        ("caf\ufffd ".encode() * 9, r"bad: 9 of 45 characters are control"),
    ],
)
def test_bytes_are_not_text(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(UserError, match=says):
        documents(FileText((str(tmp_path / "bad"),)), "test")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe: cannot be read \(no such regular file\)"):
        documents(FileText((str(tmp_path / "pipe"),)), "test")


def test_code_and_prose_with_brackets_are_text(tmp_path: Path) -> None:
    for content in ("{x} is a set\n{y} too", "[1] A. Author, Title\n[2] B. Author", "[[1, 2], [3]]", "a,b\n1,2", "{}{"):
        (tmp_path / "a.txt").write_text(content)
        found = [text for split in ("calibration", "test") for text in _documents(tmp_path / "a.txt", split)]
        assert found == [content]


def _documents(path: Path, split: str) -> list[Any]:
    try:
        return documents(FileText((str(path),)), split)
    except UserError:
        return []


@pytest.mark.parametrize("how", ["same", "symlink", "link", "copy"])
def test_a_file_is_on_one_side(tmp_path: Path, how: str) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("some text")
    {
        "same": lambda: None,
        "symlink": lambda: two.symlink_to(one),
        "link": lambda: os.link(one, two),
        "copy": lambda: shutil.copyfile(one, two),
    }[how]()
    second = one if how == "same" else two
    for source in (FileText((str(one),), test_files=(str(second),)), FileText((str(one), str(second)))):
        with pytest.raises(UserError, match=r"one\.txt and .* are the same text; list it once"):
            documents(source, "test")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"files": ["a", "a"]}, r"texts\.t\.files: lists something twice"),
        ({"mix": ["a", "b", "a"]}, r"texts\.t\.mix: lists something twice"),
        ({"files": ["a"], "column": "text", "separator": "%"}, r"give one of them"),
        ({"files": ["a"], "column": ["text"]}, r"texts\.t\.column: must be a string"),
        ({"files": ["a"], "column": ""}, r"texts\.t\.column: is empty"),
        ({"files": ["a"], "separator": "a\nb"}, r"texts\.t\.separator: is a whole line"),
        ({"hub": "a\0b"}, r"texts\.t\.hub: must be a string"),
        ({"package": "wiki"}, r"texts\.t\.package: 'wiki' is not known; known are code, wiki-en"),
    ],
)
def test_sources_that_contradict_themselves(value: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_source("t", value)


def test_special_tokens_before_a_text_are_the_tokenizers(demo: Any, with_bos: Any) -> None:
    assert leading_tokens(demo) == []
    assert leading_tokens(with_bos) == [with_bos.bos_token_id]
    backend = Tokenizer(models.WordLevel({"[g]": 0, "<p>": 1, "a": 2, "b": 3, "</s>": 4}, unk_token="b"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[g] <p> $A", None, [("[g]", 0), ("<p>", 1)])
    two = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")  # as glm4_moe has two
    assert leading_tokens(two) == [0, 1]
    assert sequences(["a b a b"], two, 4, None, 0).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    with pytest.raises(UserError, match=r"sequences of 2 tokens have no room beside \[0, 1\]"):
        sequences(["a b"], two, 2, 1, 0)


def test_every_sequence_begins_with_bos_and_none_stands_inside(with_bos: Any) -> None:
    texts = [f"document number {n} of some, with words" for n in range(40)]
    got = sequences(texts, with_bos, 16, 12, seed=3)
    assert got.shape == (12, 16)
    assert (got[:, 0] == with_bos.bos_token_id).all()
    stream: list[int] = []
    for i in np.random.default_rng(3).permutation(40):
        stream += [*with_bos(texts[i], add_special_tokens=False)["input_ids"], with_bos.eos_token_id]
    assert got[:, 1:].tolist() == np.reshape(stream[: 12 * 15], (12, 15)).tolist()


def test_chats_pass_through_the_template(with_bos: Any, demo: Any) -> None:
    got = sequences(CHATS, with_bos, 8, None, seed=0)
    stream: list[int] = []
    for i in np.random.default_rng(0).permutation(4):
        ids = with_bos.apply_chat_template(CHATS[i], tokenize=True, return_dict=False)
        assert ids[0] == with_bos.bos_token_id
        stream += ids[1:]  # one BOS per sequence; the template ends with EOS and a line
    assert got[:, 1:].flatten().tolist() == stream[: got[:, 1:].size]
    with pytest.raises(UserError, match="does not take a chat: no such role"):
        sequences([[{"role": "king", "content": "we"}]], with_bos, 4, None, 0)
    with pytest.raises(UserError, match="has no chat template"):
        sequences(CHATS, demo, 4, None, 0)


def test_templates_tell_the_same_date_on_any_day(with_bos: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ strftime_now('%d %B %Y') }} {{ messages[0].content }}"
    monkeypatch.setattr(with_bos, "chat_template", template)
    assert with_bos.decode(sequences(CHATS[:1], with_bos, 9, 1, 0)[0]) == "<s>2026-01-01"


@pytest.mark.parametrize("kind", ["prose", "no spaces", "long runs of spaces"])
def test_of_a_long_document_what_is_needed_is_tokenized(demo: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Exactly the tokens of the whole, and a small part of the work."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(20_000)]
    text = {"prose": " ", "no spaces": "", "long runs of spaces": " " * 90}[kind].join(words)
    short = ["a short one", "and another"]
    expected = sequences_of_whole([text, *short], demo, 64, 8)
    seen: list[int] = []
    encode = tokens._encode
    monkeypatch.setattr(tokens, "_encode", lambda texts, by: seen.append(sum(map(len, texts))) or encode(texts, by))
    assert sequences([text, *short], demo, 64, 8, 0).tolist() == expected
    assert sum(seen) < len(text) / (4 if kind != "long runs of spaces" else 2)


def sequences_of_whole(texts: list[str], tokenizer: Any, length: int, count: int) -> list[list[int]]:
    stream: list[int] = []
    for i in np.random.default_rng(0).permutation(len(texts)):
        stream += [*tokenizer(texts[i], add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return [stream[n * length : (n + 1) * length] for n in range(count)]


def reader_of(model: Path, file: Path | str) -> TextReader:
    source = {"files": [str(file)], "separator": "-----"}
    return TextReader(model, {"t": source}, 0, False)


@pytest.mark.parametrize("damage", ["all", "empty", "list", "garbage", "odd"])
def test_a_model_without_its_tokenizer_is_refused(tiny_moe: Path, text_file: Path, tmp_path: Path, damage: str) -> None:
    """transformers makes an empty tokenizer of nothing, and every document one EOS."""
    shutil.copytree(tiny_moe, tmp_path / "model")
    if damage == "odd":
        settings = json.loads((tiny_moe / "tokenizer_config.json").read_text()) | {"model_max_length": "x"}
        (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        for file in (tmp_path / "model").glob("tokenizer*"):
            file.unlink()
    if damage in ("empty", "list", "garbage"):
        text = {"empty": "", "list": "[]", "garbage": "{"}[damage]
        (tmp_path / "model" / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"model: (the tokenizer has no vocabulary|no tokenizer that .*); copy "):
        reader_of(tmp_path / "model", text_file)


def test_the_tokenizer_of_another_model_is_refused(tiny_moe: Path, text_file: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_moe, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, tmp_path / "model" / name)
    with pytest.raises(UserError, match=r"token .* is number 4095, and the embedding has \d+ rows"):
        reader_of(tmp_path / "model", text_file)


def test_degenerate_tokens_are_refused(demo: Any, with_bos: Any) -> None:
    rng = np.random.default_rng(0)
    prose = rng.integers(10, 4000, (16, 128))
    check_tokens(prose, demo, "fine")
    check_tokens(np.tile(prose[:2], (8, 1)), demo, "a text that is short, and comes again")
    with pytest.raises(UserError, match=r"t: 100% of the tokens are '<\|endoftext\|>'"):
        check_tokens(np.zeros((16, 128), np.int64), demo, "t")
    with pytest.raises(UserError, match=r"t: only .*come again|t: the same tokens come again"):
        check_tokens(np.tile(prose[0, :8], (16, 16)), demo, "t")
    strange = np.where(rng.random(prose.shape) < 0.1, with_bos.unk_token_id, prose)
    with pytest.raises(UserError, match=r"t: 1\d% of the tokens are <unk>, unknown"):
        check_tokens(strange, with_bos, "t")


def checked(model: Path, sources: dict[str, Any], **options: Any) -> None:
    reads: dict[str, Any] = {"trace": [4, 32, "a"], "calibrate": [4, 32, "a"], "evaluate": [4, 32, "a"]}
    common = {"model": str(model), "dtype": "float32", "device": "cpu"}
    common |= {"candidates": ["w4a16_g32", "w8a16"], "tie_gate_up": False}
    common |= {"problems": ["block=5.5"]}
    words = {name: list(map(str, options.get(name, reading))) for name, reading in reads.items()}
    check.check(check.CheckOptions(sources=canonical_json(sources), **(common | options | words)))


def test_check_reads_everything_that_the_steps_will(tiny_moe: Path, text_file: Path, tmp_path: Path) -> None:
    words = {"files": [str(text_file)], "separator": "-----"}
    checked(tiny_moe, {"a": words})
    (tmp_path / "zeros.txt").write_bytes(b"text \0" * 500)
    zeros = {"files": [str(tmp_path / "zeros.txt")]}
    for step in ("trace", "calibrate", "evaluate"):
        with pytest.raises(UserError, match=r"zeros\.txt: holds a NUL byte"):
            checked(tiny_moe, {"a": words, "b": zeros}, **{step: [4, 32, "b"]})
    with pytest.raises(UserError, match=r"text source 'a', test split: the text has [\d,]+ tokens and 9999 sequences"):
        checked(tiny_moe, {"a": words}, evaluate=[9999, 32, "a"])
    shutil.copytree(tiny_moe, tmp_path / "model")
    config = json.loads((tiny_moe / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no weights for lm_head\.weight"):
        checked(tmp_path / "model", {"a": words})


def test_check_keeps_calibration_and_evaluation_apart(tiny_moe: Path, text_file: Path, other: str) -> None:
    words = {"files": [str(text_file)], "separator": "-----"}
    sources = {"a": words, "b": {"files": [other], "test_files": [str(text_file)], "separator": "-----"}}
    with pytest.raises(UserError, match=r"texts\.b: \d\d% of what it has to evaluate on is calibration text of mixed"):
        checked(tiny_moe, sources | {"mixed": {"mix": ["a", "b"]}}, calibrate=[1, 32, "mixed"], evaluate=[4, 32, "b"])
    checked(tiny_moe, sources, evaluate=[4, 32, "a"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"problems": ["block=5.5", "block=4.9"]},
            r"granularity block, budget_bits 4\.9: .* average is 5\.0000",
        ),
        ({"fix": ["shared=w8a16"]}, r"granularity block, budget_bits 5\.5: no allocation meets .* 5\.5"),
        (
            {"problems": ["uniform=6"], "min_bits": ["block:down=6"]},
            r"granularity uniform, budget_bits 6: no alloc",
        ),
        ({"min_bits": ["all=9"]}, r"budget_bits 5\.5: layer 0 .*no candidate has the minimum bits"),
        ({"scope": "layer", "fix": ["layer:1=w8a16"]}, r"budget_bits 5\.5: no allocation meets"),
        ({"fix": ["layer:7=w8a16"]}, r"selector 'layer:7' names no block"),
        ({"trace": [1, 512, "a"]}, r"trace\.length: 512, but .* knows positions of 256 tokens"),
    ],
)
def test_check_refuses_what_no_allocation_meets(
    tiny_moe: Path, text_file: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        checked(tiny_moe, {"a": {"files": [str(text_file)], "separator": "-----"}}, **options)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl", "a.json", "a.txt"])
def test_damaged_files_of_records_are_named(tmp_path: Path, name: str) -> None:
    """Bytes changed anywhere, or cut off: documents, or an error that names the file."""
    rng = random.Random(0)
    file = tmp_path / name
    written(file, [f"text {n} of some" for n in range(30)])
    whole = file.read_bytes()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3])):
            data[rng.randrange(len(data))] = rng.choice([0, 10, 34, 44, 123, 200, 255, rng.randrange(256)])
        file.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            documents(FileText((str(file),), column="body"), "test")
        except UserError as error:
            assert name in str(error)  # noqa: PT017
