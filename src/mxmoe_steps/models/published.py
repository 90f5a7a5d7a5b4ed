"""Expert blocks that stay as their publisher quantized them: the scheme that says so, and their codes.

Experts that a publisher left in 16 bits beside such ones, like Kimi's shared experts, have no such codes.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.families import ModelFolder
from mxmoe_steps.models.places import Place
from mxmoe_steps.models.sources.tensor import Dequantized
from mxmoe_steps.schemes import SHARED, Scheme

if TYPE_CHECKING:
    import torch

    from mxmoe_steps.quantizers.grid import QuantizedWeight


def published_scheme(folder: ModelFolder) -> Scheme:
    """The scheme of the publisher's codes, by ``config.json`` alone; `UserError` where there is none."""
    if not folder.formats:
        raise UserError(
            f"{folder.path}/config.json: no publisher quantized these weights, so none can stay as published; take"
            " published out of calibrate.schemes"
        )
    found, refused = set(), []
    for source in folder.formats:
        try:
            found.add(source.scheme())
        except UserError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    if len(found) > 1:
        raise UserError(
            f"{folder.path}/config.json: weights are in several formats; in calibrate.schemes write that of the experts"
            f" instead of published: {' or '.join(map(str, sorted(found)))}"
        )
    return found.pop()


def is_published(folder: ModelFolder, layer: int, experts: Sequence[int], scheme: Scheme) -> bool:
    """Whether all blocks of ``experts`` have codes and scales of ``scheme``, by the headers of their files.

    False where they are in 16 or 32 bits, and can be quantized to such codes; `UserError` where they are anything else.
    """
    kept = {_is_kept(folder, layer, expert, block, scheme) for expert in experts for block in folder.family.own_blocks}
    if kept == {True}:
        return True
    what = f"{folder.path}: layer {layer}: {'the shared expert is' if experts == [SHARED] else 'experts are'}"
    if len(kept) > 1:
        raise UserError(f"{what} published only partly under {scheme}; take that out of calibrate.schemes")
    if scheme.scale_rows > 1:
        raise UserError(
            f"{what} published in 16 or 32 bits, and nothing is quantized to {scheme}; take that out of"
            " calibrate.schemes"
        )
    return False


def unpublished(folder: ModelFolder, scheme: Scheme) -> Iterator[tuple[int, list[int]]]:
    """Layers and experts that are to be quantized to the codes of ``scheme``; `UserError` as of `is_published`."""
    stacks = [list(range(folder.experts)), *([[SHARED]] if folder.family.shared is not None else [])]
    for layer in folder.moe_layers:
        for experts in stacks:
            if not is_published(folder, layer, experts, scheme):
                yield layer, experts


def _is_kept(folder: ModelFolder, layer: int, expert: int, block: str, scheme: Scheme) -> bool:
    place = folder.place(layer, expert, block)
    tensor = folder.raw(place.tensor)
    if not isinstance(tensor, Dequantized):
        return False
    if (own := tensor.source.scheme()) != scheme:
        raise UserError(f"{tensor.file}: {place.tensor} is published as {own}, not as {scheme}; calibrate that instead")
    tensor.check_kept(place, scheme)
    rows, _ = folder.raw_block(layer, expert, block).shape
    if rows % scheme.scale_rows:
        raise tensor.source.unkept(f"the {rows} rows of {place.tensor} that are {block} are no whole number of blocks")
    return True


def kept_block(tensor: Dequantized, place: Place, scheme: Scheme) -> "QuantizedWeight":
    """The block at ``place`` of a ``tensor`` with its publisher's codes and scales."""
    from mxmoe_steps.quantizers.grid import from_tensors

    whole = from_tensors(scheme, *tensor.kept(place, scheme))
    return whole[place.rows(len(whole.codes))]


def read_published(
    folder: ModelFolder, layer: int, experts: Sequence[int], block: str, scheme: Scheme, originals: "torch.Tensor"
) -> "QuantizedWeight":
    """The block of ``experts`` that `is_published`, a stack [E, N, K]; ``originals``: what `read_block` makes of it.

    `UserError` where the stack does not mean the same, as with scales that are no positive numbers.
    """
    import torch

    from mxmoe_steps.quantizers.grid import QuantizedWeight

    stack = []
    for expert, original in zip(experts, originals.cpu(), strict=True):
        place = folder.place(layer, expert, block)
        tensor = folder.raw(place.tensor)
        assert isinstance(tensor, Dequantized)
        stack.append(kept_block(tensor, place, scheme))
        restored = stack[-1].dequantize().to(original.dtype)
        if not (stack[-1].scales > 0).all() or not torch.equal(restored, original):
            raise UserError(
                f"{tensor.file}: layer {layer}, expert {expert}, {block}: has scales that are not positive, or numbers"
                f" too large or small for {scheme}; take that out of calibrate.schemes"
            )
    codes, scales = (torch.stack([getattr(one, part) for one in stack]) for part in ("codes", "scales"))
    return QuantizedWeight(scheme, codes, scales, None)
