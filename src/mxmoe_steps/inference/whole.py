"""A whole model in memory, packed or original, to generate with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_model(path: Path, dtype: str, device: str, trust_remote_code: bool = False) -> Iterator[Any]:
    """Within the block the transformers model of a checkpoint folder has all its weights on ``device``.

    A packed one is loaded as a user loads it. An original is read as all steps read it: audited, and dequantized where
    it was published quantized.
    """
    from transformers import GenerationConfig

    from mxmoe_steps.inference.plugin import load_quantized
    from mxmoe_steps.models.families import open_model
    from mxmoe_steps.models.streaming import StreamedModel

    if open_model(path).is_packed:
        yield load_quantized(path, device, dtype, trust_remote_code=trust_remote_code)
        return
    with StreamedModel(path, dtype, device, trust_remote_code).whole() as model:
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
        yield model
