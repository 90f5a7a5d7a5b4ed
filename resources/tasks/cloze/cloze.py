"""Questions on text of the embedded model's domains: which of four continuations is the document's own?

A document's first words are the question; the choices are its next words and those at the same place of three other
documents. The test split alone is read: neither training nor calibration saw it.
"""

import re
from typing import Any

from datasets import Dataset

from mxmoe_steps.data.sources import PackageText, documents

_QUESTION, _CHOICE, _CHOICES = 24, 4, 4  # words, words, and how many


def questions(package: str, most: int, **_: Any) -> dict[str, Dataset]:
    """At most ``most`` questions, of the documents of a text package that are long enough."""
    words = [re.findall(r"\s*\S+", text) for text in documents(PackageText(package), "test") if isinstance(text, str)]
    long = [one for one in words if len(one) >= _QUESTION + _CHOICE]
    rows = []
    for number in range(min(most, len(long))):
        endings = ["".join(long[(number + step) % len(long)][_QUESTION:][:_CHOICE]) for step in range(_CHOICES)]
        place = number % _CHOICES
        choices = [*endings[1 : 1 + place], endings[0], *endings[1 + place :]]
        rows.append({"question": "".join(long[number][:_QUESTION]), "choices": choices, "answer": place})
    return {"test": Dataset.from_list(rows)}
