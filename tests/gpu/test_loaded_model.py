"""The embedded model, quantized, on a GPU: logits and greedy text against the reference arithmetic on the CPU."""

import itertools
import logging
import sys
from pathlib import Path

import pytest
import torch
from packed import pack

import mxmoe_steps
from mxmoe_steps.inference import gpu
from mxmoe_steps.models.families import moe_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

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


def make_checkpoint(folder: Path, name: str) -> str:
    dealt = [itertools.cycle(names) for names in LAYERS[name]]
    return str(
        pack(MODEL, folder / name, lambda layer, _: (next(dealt[layer]), next(dealt[layer]), next(dealt[layer])))
    )


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
    assert all(isinstance(model.get_submodule(moe_path(layer)), gpu.KernelMoe) for layer in (0, 1, 2, 3, 5))
    with torch.no_grad():
        exact = mxmoe_steps.load_quantized(checkpoint, dtype="float32")(tokens).logits.double()
        rounded = mxmoe_steps.load_quantized(checkpoint, dtype="bfloat16")(tokens).logits.double()
    print((got - exact).norm() / exact.norm(), (rounded - exact).norm() / exact.norm())
    assert (got - exact).norm() < 1.5 * (rounded - exact).norm()


def test_greedy_text_is_that_of_the_reference_up_to_ties(checkpoints: dict[str, str], tokens: torch.Tensor) -> None:
    checkpoint = checkpoints["fine"]
    model = mxmoe_steps.load_quantized(checkpoint, "cuda", "bfloat16")
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


def main() -> None:
    """Build the kernels of the checkpoints into folders in ``argv[1]``: run where there is a compiler and no GPU."""
    import argparse
    import tempfile

    from mxmoe_steps.inference.build import build_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        for name in LAYERS:
            path, out = make_checkpoint(Path(folder), name), Path(sys.argv[1]) / name
            build_checkpoint(argparse.Namespace(checkpoint=path, threads=2, out=str(out)))


if __name__ == "__main__":
    main()
