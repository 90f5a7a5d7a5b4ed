"""Compile kernels ahead of time; needs no GPU.

The result is a shared library that tvm_ffi loads, with the machine code beside it for `lint`. It is cached
under the hash of the configuration and of everything that shapes the code, so a rebuild is a file lookup.

As a command it compiles what a layer with the given schemes needs: the kernels of their mixture,
and the token kernels.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from pydantic import Field

from mxmoe_steps.atomic import canonical_json, write_json
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.kernels.architecture import Architecture, Configuration
from mxmoe_steps.kernels.architectures import BUILT, DEFAULT
from mxmoe_steps.kernels.codes.format import EDGE, OPERAND_BITS, Format
from mxmoe_steps.kernels.formats import kernel_format
from mxmoe_steps.options.base import Count, InFolder, OutFile, Schemes, StepOptions
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.provenance import closure, module_hash
from mxmoe_steps.schemes import parse_scheme

COMPILER = "4.8.1"  # nvidia-cutlass-dsl; other versions are untested and refused
ENTRY = "kernel"  # name of the function in every library
RUNTIME = "libcute_dsl_runtime.so"

_TOKENS = tuple(f"{__package__}.{name}" for name in ("tokens", "activations", "activate", "combine", "rotated"))


def default_cache() -> Path:
    """``$MXMOE_KERNEL_CACHE``, or a folder in the user's cache."""
    folder = os.environ.get("MXMOE_KERNEL_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "mxmoe-steps" / "kernels"


@dataclass(frozen=True)
class TokenKernel:
    """One of `Architecture.token_kernels`, or of `LayerPlan.token_kernels`."""

    name: str
    architecture: Architecture = DEFAULT


Kernel = Configuration | TokenKernel  # a grouped GEMM, or one of the kernels around it


def architecture_of(kernel: Kernel) -> Architecture:
    """Whose GPUs it is for."""
    if isinstance(kernel, TokenKernel):
        return kernel.architecture
    return next(one for one in BUILT if isinstance(kernel, one.configuration))


def library_path(kernel: Kernel, cache: Path | None = None) -> Path:
    """Where a compiled kernel is or would be.

    The name is a hash of the configuration, the architecture, the generator's code, that of its formats, and the
    compiler; the same on every machine. Two architectures may have one target: their token kernels differ.
    """
    architecture = architecture_of(kernel)
    spec = f"{architecture.name} {kernel.name}" if isinstance(kernel, TokenKernel) else canonical_json(kernel.spec())
    parts = [spec, architecture.target, COMPILER]
    parts += [module_hash(module) for module in sorted({__name__, *_sources(kernel)})]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return (cache or default_cache()) / f"{key}.so"


def _sources(kernel: Kernel) -> set[str]:
    """Modules of this package that shape the kernel: its generator, and its own formats."""
    roots = list(_TOKENS)
    if not isinstance(kernel, TokenKernel):
        roots = [architecture_of(kernel).generator, *(type(format_).__module__ for format_ in kernel.formats)]
    return {module for root in roots for module in closure(root) if module.startswith(f"{__package__}.")}


def build(kernel: Kernel, cache: Path | None = None) -> Path:
    """Compile a kernel unless it is in the cache; returns the library.

    Beside it: the machine code (``.cubin``) and what it was made from (``.json``).
    """
    library = library_path(kernel, cache)
    if library.is_file():
        return library
    _require_compiler()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        folder = Path(name)
        record: dict[str, Any] = {"name": kernel.name}
        if isinstance(kernel, TokenKernel):
            generator, arguments = _token_kernel(kernel)
        else:
            generator, arguments = _group_gemm(kernel)
            record["config"] = kernel.spec()
        compiled = _compile(generator, arguments, architecture_of(kernel).target, folder)
        write_json(library.with_suffix(".json"), record)
        next(folder.glob("*.cubin")).replace(library.with_suffix(".cubin"))
        compiled.replace(library)  # last: a library is complete
    return library


def runtime_library() -> Path:
    """The compiler's run-time library, which compiled kernels need loaded before them."""
    _require_compiler()
    from cutlass import cute

    return next(Path(path) for path in cute.runtime.find_runtime_libraries(enable_tvm_ffi=True) if RUNTIME in path)


def _require_compiler() -> None:
    try:
        installed = metadata.version("nvidia-cutlass-dsl")
    except metadata.PackageNotFoundError:
        raise UserError("GPU kernels need the extra [cuda]: pip install 'mxmoe-steps[cuda]'") from None
    if installed != COMPILER:
        raise UserError(
            f"GPU kernels need nvidia-cutlass-dsl {COMPILER}, found {installed}: pip install 'mxmoe-steps[cuda]'"
        )
    if shutil.which("gcc") is None:
        raise UserError("building GPU kernels links with gcc, which is not on PATH")


def _compile(generator: Any, arguments: list[Any], target: str, folder: Path) -> Path:
    """Trace, compile and link in ``folder``; the compiler leaves the cubin there."""
    import tvm_ffi
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream

    compiled = cute.compile(
        generator,
        *arguments,
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--gpu-arch {target} --enable-tvm-ffi --keep-cubin --dump-dir={folder}",
    )
    compiled.export_to_c(str(folder / "kernel.o"), function_name=ENTRY)
    library = folder / "kernel.so"
    folders = [runtime_library().parent, Path(tvm_ffi.__file__).parent / "lib"]
    command = ["gcc", "-shared", "-o", str(library), str(folder / "kernel.o"), "-Wl,-rpath,$ORIGIN"]
    command += [f"-L{path}" for path in folders] + ["-lcute_dsl_runtime", "-ltvm_ffi"]
    subprocess.run(command, check=True)
    return library


def _group_gemm(config: Configuration) -> tuple[Any, list[Any]]:
    """The generator of a grouped GEMM and stand-ins for its arguments."""
    from cutlass import Int32
    from cutlass.cute import sym_int

    generator = import_module(architecture_of(config).generator)
    tensors = tuple(tensor for pair in _fake_pairs(config) for tensor in pair)
    problems = _fake(Int32, (sym_int(), 4), 16)
    offsets = _fake(Int32, (sym_int(),), 4)
    out = _fake(_boundary_type("bf16"), (sym_int(), sym_int(divisibility=8)), 16)
    counters = _fake(Int32, (2,), 4)
    return generator.GroupGemm(config), [tensors, problems, offsets, out, counters, Int32(64), Int32(1)]


def _token_kernel(kernel: TokenKernel) -> tuple[Any, list[Any]]:
    """The generator of a token kernel and stand-ins for its arguments."""
    from cutlass import BFloat16, Float32, Int32, Int64
    from cutlass.cute import sym_int

    from mxmoe_steps.gating import of_variant
    from mxmoe_steps.kernels.activate import Activate
    from mxmoe_steps.kernels.activations import Quantize, SwiGlu
    from mxmoe_steps.kernels.combine import Combine
    from mxmoe_steps.kernels.rotated import ActivateRotated, DispatchRotated, QuantizeRotated, SwiGluRotated
    from mxmoe_steps.kernels.tokens import DispatchTokens, SortByExpert

    architecture = kernel.architecture
    rotated = kernel.name.endswith("_rotated")
    kind, _, variant = kernel.name.removesuffix("_rotated").partition("_")
    expert_ids, row = (_fake(number, (sym_int(), sym_int()), 4) for number in (Int64, Int32))
    needs, count = _fake(Int32, (sym_int(),), 4), Int32(1)
    bf16 = [_fake(BFloat16, (sym_int(), sym_int(divisibility=64)), 16) for _ in range(3)]
    if kind == "sort":
        return SortByExpert(architecture, int(variant)), [expert_ids, row, _fake(Int32, (sym_int(),), 4), count]
    if kind == "combine":
        number, size = (BFloat16, 2) if variant.startswith("bf16") else (Float32, 4)
        weights, gate = _fake(number, (sym_int(), sym_int()), size), _fake(BFloat16, (sym_int(),), 2)
        biased = variant.endswith("biased")
        choices = (row, expert_ids, bf16[2]) if biased else (row,)
        return Combine(architecture, biased), [bf16[0], choices, weights, gate, bf16[1], count, count]
    scaled = [(_fake_tokens(operand), _fake(Float32, (sym_int(),), 4)) for operand in architecture.scaled_outputs]
    outputs = (bf16[1], *(tensor for pair in scaled for tensor in pair))
    if kind == "dispatch":
        gating = (_fake(BFloat16, (1, sym_int(divisibility=64)), 16), _fake(BFloat16, (sym_int(),), 2))
        generator = (DispatchRotated if rotated else DispatchTokens)(architecture, variant == "gated")
        return generator, [bf16[0], expert_ids, row, needs, outputs, gating, count]
    if kind == "activate":
        inputs = (bf16[0], bf16[2], Float32(1.0), Float32(1.0))
        activate = (ActivateRotated if rotated else Activate)(architecture, of_variant(variant))
        return activate, [inputs, expert_ids, row, needs, outputs, count]
    plain, turned = {"swiglu": (SwiGlu, SwiGluRotated), "quantize": (Quantize, QuantizeRotated)}[kind]
    return (turned if rotated else plain)(architecture), [bf16[0], expert_ids, row, needs, outputs, count]


def _boundary_type(operand: str) -> Any:
    """The type that tensors of an operand have outside: 8-bit types cross as bytes, 4-bit ones two a byte."""
    import cutlass

    return cutlass.BFloat16 if operand == "bf16" else cutlass.Uint8


def _fake(kind: Any, shape: tuple, align: int) -> Any:
    """A compile-time stand-in for a contiguous tensor."""
    from cutlass.cute.runtime import make_fake_compact_tensor

    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(kind, shape, stride_order=order, assumed_align=align)


def _fake_pairs(config: Configuration) -> Iterator[tuple[Any, Any]]:
    """Stand-ins for `GroupGemm`'s ``tensors``: (activations, scales) pairs, then (weights, scales) pairs."""
    import cutlass
    from cutlass.cute import sym_int

    for operand in config.operands:
        yield _fake_tokens(operand), _fake(cutlass.Float32, (sym_int(),), 4)
    for format_ in config.formats:
        yield _fake_weights(format_), _fake(cutlass.Float32, (sym_int(), sym_int()), 4)


def _fake_tokens(operand: str) -> Any:
    """Activations [rows, K], or [rows, K / 2] of two a byte."""
    from cutlass.cute import sym_int

    columns = sym_int(divisibility=EDGE * min(8, OPERAND_BITS[operand]) // 8)
    return _fake(_boundary_type(operand), (sym_int(), columns), 16)


def _fake_weights(format_: Format) -> Any:
    from cutlass.cute import sym_int

    if format_.decoded:
        return _fake(_boundary_type("fp8"), (sym_int(),), 16)
    return _fake(_boundary_type(format_.operand), (sym_int(), sym_int(), sym_int(divisibility=64)), 16)


class BuildOptions(StepOptions):
    """Options of the command."""

    schemes: Schemes = Field(description="schemes whose kernels to compile")
    max_problems: Count = Field(128, description="experts x blocks of one launch")
    cache: InFolder | None = Field(
        None, description="folder of compiled kernels (default: $MXMOE_KERNEL_CACHE or the user's cache)"
    )
    out: OutFile = Field(description="JSON file to write: the library of every kernel")


def build_schemes(options: BuildOptions) -> None:
    """Compile the kernels of ``options.schemes`` and write which library is which."""
    formats = tuple(sorted({kernel_format(parse_scheme(text)) for text in options.schemes}))
    kernels: dict[str, Kernel] = {
        phase: DEFAULT.config(formats, phase, options.max_problems) for phase in DEFAULT.phases
    }
    kernels |= {name: TokenKernel(name) for name in DEFAULT.token_kernels}
    libraries = {name: build(kernel, options.cache).name for name, kernel in kernels.items()}
    record = {"formats": [format_.name for format_ in formats], "architecture": DEFAULT.target, "libraries": libraries}
    write_json(options.out, record)


def main() -> None:
    """Command line."""
    build_schemes(parse(BuildOptions, __doc__))


if __name__ == "__main__":
    run_cli(main)
