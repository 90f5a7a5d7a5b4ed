"""vLLM on a packed checkpoint beside `load_quantized`; as a script, vLLM in a process of its own.

python engine.py FOLDER TOKENS.pt OUT.pt '{"tensor_parallel_size": 2}'
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stand_in import stand_in

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_CI_ENV": "1",  # compiles with Dynamo alone, and warms nothing up
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_KIMI_K3_GEMM_AR": "0",  # a kernel for GPUs
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_batched_tokens": 1024,
    "max_num_seqs": 8,
    "enable_prefix_caching": False,
    "seed": 0,
    "skip_tokenizer_init": True,
}

ON_KERNELS = "MXMOE_TEST_ON_KERNELS"

A16 = ("w4a16_g32", "w3a16_g32", "w2a16_g64", "w8a16", "w16a16", "w1a16_g32", "w4a16_g128_sym")
ALL = (*A16, "w8a8", "w8a8_fp8", "w4a8_g32", "w4a4", "w4a8_g64_fp8")


def dealt(schemes: tuple[str, ...]) -> Callable[[int, int], tuple[str, str, str]]:
    """Other schemes for every block of a layer and its neighbours."""

    def of(layer: int, expert: int) -> tuple[str, str, str]:
        first = 7 * layer + 3 * (expert + 1)
        gate, up, down = (schemes[(first + block) % len(schemes)] for block in range(3))
        return gate, up, down

    return of


def expected(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all tokens [N, T] but the first, float32 [N, T - 1], in transformers."""
    from mxmoe_steps import load_quantized

    with torch.inference_mode():
        logits = load_quantized(str(folder), dtype="float32")(tokens).logits.float()
    return logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)


def served(folder: Path | str, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """The same in vLLM."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    llm = LLM(model=str(folder), **(OPTIONS | options))
    prompts = [TokensPrompt(prompt_token_ids=row) for row in tokens.tolist()]
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    found = [
        [place[token].logprob for place, token in zip(result.prompt_logprobs[1:], row[1:], strict=True)]
        for result, row in zip(llm.generate(prompts, settings, use_tqdm=False), tokens.tolist(), strict=True)
    ]
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return torch.tensor(found)


def run_alone(
    folder: Path, tokens: torch.Tensor, work: Path, on_kernels: bool = False, **options: Any
) -> tuple[torch.Tensor | None, str]:
    """`served` in a process of its own, and what that wrote; None where it failed. ``on_kernels``: see `stand_in`."""
    torch.save(tokens, work / "tokens.pt")
    command = [sys.executable, __file__, folder, work / "tokens.pt", work / "out.pt", json.dumps(options)]
    environment = os.environ | SETTINGS | ({ON_KERNELS: "1"} if on_kernels else {})
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return (torch.load(work / "out.pt") if done.returncode == 0 else None), done.stdout


def main() -> None:
    """Command line."""
    folder, tokens, out, options = sys.argv[1:]
    torch.save(served(folder, torch.load(tokens), **json.loads(options)), out)


if __name__ in ("__main__", "__mp_main__") and ON_KERNELS in os.environ:  # and so in vLLM's ranks
    stand_in()

if __name__ == "__main__":
    main()
