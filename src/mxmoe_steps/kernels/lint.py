"""What the machine code of a compiled kernel says about it: read from the cubin, no GPU needed."""

import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from mxmoe_steps.errors import UserError

_MMA = re.compile(r"\b([HQI]GMMA)\.64x(\d+)x\d+\S*\s+R(\d+),")
_WARP_MMA = re.compile(r"\b([HQI]MMA)\.\d")
_WAIT_ALL = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0\b")
_TO_UNIFORM = re.compile(r"\bR2UR\b")
_LOCAL = re.compile(r"\b(LDL|STL)\b")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")


@dataclass(frozen=True)
class MachineCode:
    """``matrix``: matrix instructions by opcode (HGMMA bf16, QGMMA fp8, IGMMA int8; HMMA, QMMA, IMMA of one warp).
    ``groups``: those that end a commit group; as many as matrix instructions of warpgroups means that the assembler
    serialized them, for lack of registers mostly. ``spills``: local memory loads and stores. ``registers``: highest
    register number + 1. ``early_reads``: instructions that touch an accumulator after its ``wgmma`` and before the wait
    for it. ``to_uniform``: copies to uniform registers; hundreds mean that what all lanes share is kept in registers of
    each. ``code_bytes``: size of the code."""

    matrix: dict[str, int]
    groups: int
    spills: int
    registers: int
    early_reads: list[str]
    to_uniform: int
    code_bytes: int


def disassembler() -> str | None:
    """nvdisasm, from PATH or from the package nvidia-cuda-nvdisasm."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/**/bin/nvdisasm"))
    return shutil.which("nvdisasm") or (str(packaged[-1]) if packaged else None)


def disassemble(cubin: Path) -> str:
    """SASS of ``cubin``; `UserError` when no nvdisasm is installed."""
    tool = disassembler()
    if tool is None:
        raise UserError("reading machine code needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    return subprocess.run([tool, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout


def inspect(sass: str) -> MachineCode:
    """Scan SASS top to bottom. Accumulators count as busy from a matrix instruction to the next full wait."""
    matrix: dict[str, int] = {}
    groups, spills, registers, to_uniform, code_bytes = 0, 0, 0, 0, 0
    busy: set[int] = set()
    early: list[str] = []
    for line in sass.splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        text = found[2]
        code_bytes += 16
        used = {int(number) for number in _REGISTER.findall(text)}
        registers = max(registers, *(number + 1 for number in used), 0) if used else registers
        spills += _LOCAL.search(text) is not None
        to_uniform += _TO_UNIFORM.search(text) is not None
        multiply, by_warp = _MMA.search(text), _WARP_MMA.search(text)
        if by_warp:
            matrix[by_warp[1]] = matrix.get(by_warp[1], 0) + 1
        if multiply:
            matrix[multiply[1]] = matrix.get(multiply[1], 0) + 1
            groups += "gsb0" in text
            start = int(multiply[3])
            busy |= set(range(start, start + int(multiply[2]) // 2))
        elif _WAIT_ALL.search(text):
            busy = set()
        elif used & busy:
            early.append(text)
    return MachineCode(matrix, groups, spills, registers, early, to_uniform, code_bytes)


def spills_in_loops(sass: str) -> int:
    """Local memory loads and stores in the shortest loop around every matrix instruction. What looks like longer ones
    may lead back from where the wait for a barrier was moved out of the way."""
    lines = sass.splitlines()
    labels = {found[1]: at for at, line in enumerate(lines) if (found := _LABEL.match(line))}
    loops = [
        range(labels[found[1]], at)
        for at, line in enumerate(lines)
        if (found := _BRANCH.search(line)) and labels.get(found[1], at) < at
    ]
    multiply = [at for at, line in enumerate(lines) if _WARP_MMA.search(line) or _MMA.search(line)]
    around = [[loop for loop in loops if at in loop] for at in multiply]
    shortest = {min(some, key=len) for some in around if some}
    return sum(_LOCAL.search(lines[at]) is not None for loop in shortest for at in loop)
