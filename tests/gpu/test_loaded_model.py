"""The embedded model, quantized, on a GPU: logits and greedy text against the reference arithmetic on the CPU."""

import itertools
import logging
import sys
from pathlib import Path

import pytest
import torch
from gpu_marks import needs_kernels
from packed import pack
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import DeferredStopCheck

import mxmoe_steps
from mxmoe_steps.inference import gpu

pytestmark = needs_kernels

MODEL = Path(__file__).parents[2] / "resources" / "demo-moe"
LAYERS = {  # schemes dealt to the blocks of a layer
    "coarse": (
        ("w4a16",),
        ("w2a16", "w4a16", "w8a8_fp8"),
        ("w16a16", "w4a8_fp8", "w8a8", "w4a16"),
        ("w8a8_fp8",),
        ("w4a4",),  # no kernel: stays with the reference
        ("w8a16",),
    ),
    # Few bits amplify rounding: in bfloat16 on the CPU, "coarse" chooses a token that in float32 is twice as far behind
    # as the bound of greedy text below, "fine" none that is further behind than a sixth of it
    "fine": (
        ("w4a16",),
        ("w3a16", "w4a16", "w8a8_fp8"),
        ("w16a16", "w4a8_fp8", "w8a8", "w4a16"),
        ("w8a8_fp8",),
        ("w4a8",),
        ("w8a16",),
    ),
}
LAYERS["rotated"] = LAYERS["fine"]


def make_checkpoint(folder: Path, name: str) -> str:
    dealt = [itertools.cycle(names) for names in LAYERS[name]]
    quantizer = "rtn+hadamard" if name == "rotated" else "rtn"

    def schemes_of(layer: int, _: int) -> tuple[str, str, str]:
        return next(dealt[layer]), next(dealt[layer]), next(dealt[layer])

    return str(pack(MODEL, folder / name, schemes_of, quantizer))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("demo")
    return {name: make_checkpoint(folder, name) for name in LAYERS}


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, 4000, (3, 70), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["device", "device_map", "to"])
def test_logits_are_as_near_as_bfloat16_on_the_cpu(
    checkpoints: dict[str, str], tokens: torch.Tensor, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = checkpoints["coarse"]
    with caplog.at_level(logging.INFO, logger="mxmoe_steps"):
        if how == "to":
            model = mxmoe_steps.load_quantized(checkpoint, dtype="bfloat16").to("cuda")
        else:
            model = mxmoe_steps.load_quantized(checkpoint, dtype="bfloat16", **{how: "cuda"})
        with torch.no_grad():
            got = model(tokens.cuda()).logits.cpu().double()
    assert "layers 0-3, 5 run the GPU kernels; layers 4 run reference arithmetic (scheme w4a4" in caplog.text
    assert all(isinstance(model.get_submodule(f"model.layers.{layer}.mlp"), gpu.KernelMoe) for layer in (0, 1, 2, 3, 5))
    with torch.no_grad():
        exact = mxmoe_steps.load_quantized(checkpoint, dtype="float32")(tokens).logits.double()
        rounded = mxmoe_steps.load_quantized(checkpoint, dtype="bfloat16")(tokens).logits.double()
    print((got - exact).norm() / exact.norm(), (rounded - exact).norm() / exact.norm())
    assert (got - exact).norm() < 1.5 * (rounded - exact).norm()


@pytest.mark.parametrize("name", ["fine", "rotated"])
def test_greedy_text_is_that_of_the_reference_up_to_ties(
    checkpoints: dict[str, str], tokens: torch.Tensor, name: str
) -> None:
    checkpoint = checkpoints[name]
    model = mxmoe_steps.load_quantized(checkpoint, "cuda", "bfloat16")
    moe = [model.get_submodule(f"model.layers.{layer}.mlp") for layer in range(6)]
    assert all(isinstance(module, gpu.KernelMoe) for module in moe)
    assert any(module.layer.plan.rotated for module in moe) == (name == "rotated")
    prompt = tokens[:2, :16]
    text = model.generate(prompt.cuda(), max_new_tokens=40, do_sample=False, eos_token_id=None).cpu()
    assert text.shape == (2, 56)
    reference = mxmoe_steps.load_quantized(checkpoint, dtype="float32")
    with torch.no_grad():
        logits = reference(text).logits[:, 15:-1]
    chosen = logits.gather(-1, text[:, 16:, None])[..., 0]
    behind = logits.amax(-1) - chosen  # 0 where the reference chooses the same token
    print("same tokens:", (behind == 0).float().mean().item(), "furthest behind:", behind.max().item())
    assert (behind == 0).float().mean() > 0.8
    assert behind.max() < 0.1 * logits.std()


def behind(checkpoint: str, text: torch.Tensor, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How far each generated token's logit is behind the largest in the model that is not compiled; all its logits."""
    model = mxmoe_steps.load_quantized(checkpoint, "cuda", "bfloat16")
    with torch.no_grad():
        logits = model(text).logits[:, prompt - 1 : -1].float()
    return logits.amax(-1) - logits.gather(-1, text[:, prompt:, None])[..., 0], logits


def test_generate_with_a_static_cache_compiles_and_gives_the_tokens_of_the_uncompiled_model(
    checkpoints: dict[str, str], tokens: torch.Tensor
) -> None:
    model = mxmoe_steps.load_quantized(checkpoints["fine"], "cuda", "bfloat16")
    assert model.hf_quantizer.is_compileable
    torch._dynamo.reset()
    for batch in (1, 3, 2):  # the first is compiled for one sequence, the second for any number
        prompt = tokens[:batch, :16].cuda()
        text = model.generate(
            prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, cache_implementation="static"
        )
        assert text.shape == (batch, 40)
        late, logits = behind(checkpoints["fine"], text, 16)
        print(batch, "same tokens:", (late == 0).float().mean().item(), "furthest behind:", late.max().item())
        assert (late == 0).float().mean() > 0.8
        assert late.max() < 0.1 * logits.std()
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


class Collected(BaseStreamer):
    """What was streamed."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("cache", [None, "static"])
def test_the_deferred_check_for_the_end_leaves_no_trace(
    checkpoints: dict[str, str], tokens: torch.Tensor, cache: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mxmoe_steps.load_quantized(checkpoints["fine"], "cuda", "bfloat16")
    torch._dynamo.reset()
    steps = []
    finish = DeferredStopCheck.finish
    monkeypatch.setattr(DeferredStopCheck, "finish", lambda check: steps.append(finish(check)) or steps[-1])
    settings = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    for batch in (3, 1):
        prompt = tokens[:batch, :16].cuda()
        endless = model.generate(prompt, eos_token_id=None, **settings)
        ends = endless[:, 16 + 12].tolist()  # all sequences end before the limit

        def generate(prompt: torch.Tensor = prompt, ends: list[int] = ends) -> tuple[torch.Tensor, list[int]]:
            streamer = Collected() if len(prompt) == 1 else None
            text = model.generate(prompt, eos_token_id=ends, streamer=streamer, **settings)
            return text, streamer.tokens if streamer else []

        deferred, streamed = generate()
        with monkeypatch.context() as patch:
            patch.setattr(DeferredStopCheck, "is_supported", staticmethod(lambda *_, **__: False))
            waiting, streamed_waiting = generate()
        assert deferred.shape[1] < endless.shape[1]
        assert torch.equal(deferred, waiting)
        assert streamed == streamed_waiting
    assert steps == [0, 1, 0, 1]  # undone: none at the limit of tokens, one at the end of all texts


def test_a_layer_in_reference_arithmetic_keeps_generate_from_compiling(
    checkpoints: dict[str, str], tokens: torch.Tensor
) -> None:
    model = mxmoe_steps.load_quantized(checkpoints["coarse"], "cuda", "bfloat16")
    assert not model.hf_quantizer.is_compileable
    text = model.generate(tokens[:1, :8].cuda(), max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert text.shape[1] <= 12


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_without_a_graph_break_for_batches_in_any_order(
    checkpoints: dict[str, str], tokens: torch.Tensor, mode: str
) -> None:
    model = mxmoe_steps.load_quantized(checkpoints["fine"], "cuda", "bfloat16")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for rows in (2, 1, 3, 2):
            inputs = tokens[:rows].cuda()
            expected = model(inputs, use_cache=False).logits.float()
            got = compiled(inputs, use_cache=False).logits.float()
            assert (got - expected).norm() < 0.06 * expected.norm()  # rounded to bfloat16 in other places


def test_continuous_batching_gives_the_tokens_of_generate(checkpoints: dict[str, str], tokens: torch.Tensor) -> None:
    model = mxmoe_steps.load_quantized(checkpoints["fine"], "cuda", "bfloat16")
    requests = [tokens[row, : 9 + 20 * row].tolist() for row in range(3)]
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)
    done = model.generate_batch(inputs=requests, generation_config=settings, progress_bar=False)
    made = {tuple(one.prompt_ids): one.generated_tokens for one in done.values()}
    for request in requests:
        text = torch.tensor([request + made[tuple(request)]], device="cuda")
        assert text.shape[1] == len(request) + 12
        late, logits = behind(checkpoints["fine"], text, len(request))
        assert late.max() < 0.1 * logits.std()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_gpus_give_the_logits_of_one(checkpoints: dict[str, str], tokens: torch.Tensor) -> None:
    one = mxmoe_steps.load_quantized(checkpoints["fine"], "cuda", "bfloat16")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 0}  # one tied matrix
    places |= {f"model.layers.{layer}": int(layer >= 3) for layer in range(6)}
    two = mxmoe_steps.load_quantized(checkpoints["fine"], dtype="bfloat16", device_map=places)
    assert two.get_submodule("model.layers.5.mlp").layer.device == torch.device("cuda", 1)
    with torch.no_grad():
        assert torch.equal(two(tokens.cuda()).logits.to("cuda:0"), one(tokens.cuda()).logits)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    prompt = tokens[:2, :16].cuda()
    assert torch.equal(two.generate(prompt, **settings).to("cuda:0"), one.generate(prompt, **settings))


def main() -> None:
    """Build the kernels of the checkpoints into folders in ``argv[1]``: run where there is a compiler and no GPU."""
    import tempfile

    from mxmoe_steps.inference.build import BuildOptions, build_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        for name in LAYERS:
            path, out = make_checkpoint(Path(folder), name), Path(sys.argv[1]) / name
            build_checkpoint(BuildOptions(checkpoint=path, threads=2, out=out))


if __name__ == "__main__":
    main()
