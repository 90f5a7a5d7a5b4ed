"""A tiny random MoE checkpoint with its tokenizer, and text to run it on."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from synthetic import WORDS
from workflow import make_project, snakemake


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of random words, separated by lines of dashes."""
    import random

    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=60)) for _ in range(300)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n-----\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """qwen2_moe: 2 layers, 4 experts (one never routed to), top-2, shared expert; saved as a checkpoint."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

    path = tmp_path_factory.mktemp("model") / "tiny-moe"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train([str(text_file)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=True,
    )
    model = Qwen2MoeForCausalLM(config)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[3] = 0  # logit 0 ...
        model.model.layers[1].mlp.gate.weight[:2] = 0
        model.model.layers[1].mlp.gate.weight[2] = 1e-3  # ... so ties fall on the first experts
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def finished(tiny_moe: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that ran to the end, made once for all workers of the test run: to be copied, not changed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            snakemake(make_project(folder / "project", tiny_moe, text_file))
            (folder / "complete").touch()
    return folder / "project"


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of one that ran to the end, with times and with what Snakemake remembers."""
    return Path(shutil.copytree(finished, tmp_path / "project"))
