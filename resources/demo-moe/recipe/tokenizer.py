"""Byte-level BPE tokenizer of the demo model, trained on the text of corpus.py, and the tokenized text.

    python tokenizer.py --corpus build/corpus --out build/tokens --vocab 4096

Writes tokenizer.json and tokenizer_config.json, and `<split>.<domain>.bin` (uint16 token ids, every
document ended by `<|endoftext|>`) with their byte counts in `bytes.json`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
SAMPLE_BYTES = 6_000_000  # per domain: rarer languages and mathematics weigh as much as prose


def read(path: Path) -> list[str]:
    """Documents of one text file."""
    return path.read_text(encoding="utf-8").split(f"\n{END}\n")


def sample(corpus: Path) -> Iterator[str]:
    """At most ``SAMPLE_BYTES`` characters of every domain's training text."""
    for path in sorted(corpus.glob("train.*.txt")):
        size = 0
        for text in read(path):
            if size > SAMPLE_BYTES:
                break
            size += len(text)
            yield text


def train(corpus: Path, vocab: int) -> Tokenizer:
    """A byte-level BPE: every byte string encodes and decodes exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(corpus), trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tokenizer and tokenize the corpus.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder written by corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer and the token files")
    parser.add_argument("--vocab", type=int, default=4096, help="vocabulary size")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train(args.corpus, args.vocab)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, model_max_length=2048, clean_up_tokenization_spaces=False
    ).save_pretrained(args.out)
    end = tokenizer.token_to_id(END)
    sizes = {}
    for path in sorted(args.corpus.glob("t*.*.txt")):
        texts = read(path)
        ids = [i for e in tokenizer.encode_batch(texts, add_special_tokens=False) for i in (*e.ids, end)]
        np.asarray(ids, dtype=np.uint16).tofile(args.out / f"{path.stem}.bin")
        sizes[path.stem] = sum(len(text.encode()) for text in texts)
        print(f"{path.stem}  {len(ids):,} tokens  {sizes[path.stem] / len(ids):.2f} bytes/token", flush=True)
    (args.out / "bytes.json").write_text(json.dumps(sizes, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
