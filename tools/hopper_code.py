"""What the machine code of the kernels for Hopper must have: registers handed out anew, TMA, barriers, products in flight."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from prefix_kernels.backends.triton.hopper import CONSUMER_REGISTERS, PRODUCER_REGISTERS, REGISTERS
from prefix_kernels.backends.triton.tile_sizes import Tile

THREADS = 384  # two consumer warpgroups, and one of whose warps the producer is the only one to work
SOFTMAXES = 8  # for each of two warpgroups: prefix and keys, with and without a mask
STACK, BACKWARD_STACK = 48, 48  # bytes, for the thread's number and for what no block needs
WIDE = 128  # heads of more: dk's and dv's products are launched apart, so that fewer stand beside the exponentials
SCORES, SUMS = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"  # the waits for them
OTHER_WAITS = 4  # for each of two warpgroups: the first scores, the last sums
INSTRUCTIONS = {"HGMMA": 1, "UTMALDG": 6, "UTMASTG": 2, "SYNCS": 20, "USETMAXREG": 2}  # and how many at least
BACKWARD = {"hopper_dq": (8, 28), "hopper_dkeys": (2, 6), "hopper_dprefix": (2, 6)}  # softmaxes, waits of two warpgroups
BACKWARD_INSTRUCTIONS = {"HGMMA": 1, "UTMALDG": 6, "SYNCS": 14, "USETMAXREG": 2}


def missing_in(compiled, tile: Tile) -> list[str]:
    """What is wrong with a compiled hopper_kernel; empty if nothing."""
    sass = disassembled(compiled.asm["cubin"])
    wrong = warps_and_instructions(compiled.asm["ptx"], sass, INSTRUCTIONS)
    softmaxes = exponentials(sass)
    if len(softmaxes) < SOFTMAXES:
        wrong.append(f"{len(softmaxes)} waits for scores that leave sums on their way")
    wrong += [f"{after} of {before + after} exponentials wait for the sums" for before, after in softmaxes if after]
    wrong += [f"{before} exponentials in a softmax" for before, _ in softmaxes if before < tile.BLOCK_N // 2]
    if sass.count(SUMS) > len(softmaxes) + OTHER_WAITS:
        wrong.append("wgmma is serialised: more waits than the source has")
    return wrong + local_memory(sass, reads=1, writes=1)


def missing_in_backward(compiled, kernel: str, tile: Tile, head_dim: int) -> list[str]:
    """The same of a kernel of the backward pass, of which a thread has half a row of each block's weights."""
    softmaxes, waits = BACKWARD[kernel]
    sass = disassembled(compiled.asm["cubin"])
    wrong = warps_and_instructions(compiled.asm["ptx"], sass, BACKWARD_INSTRUCTIONS)
    least = softmaxes * (tile.BLOCK_N if kernel == "hopper_dq" else tile.BLOCK_M) // 2
    beside = 0
    for left, between in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)(.*?)(?=WARPGROUP\.DEPBAR|\Z)", sass, re.DOTALL):
        beside += between.count("MUFU.EX2") if int(left) else 0
    if head_dim <= WIDE and beside < least:
        wrong.append(f"{beside} exponentials beside products, of {least}")
    if len(re.findall(r"WARPGROUP\.DEPBAR", sass)) > waits:
        wrong.append("wgmma is serialised: more waits than the source has")
    return wrong + local_memory(sass, reads=1, writes=0)


def local_memory(sass: str, reads: int, writes: int) -> list[str]:
    """What is wrong with loops that read and write more words of local memory than these."""
    found = [(len(re.findall(r"\bLDL", loop)), len(re.findall(r"\bSTL", loop))) for loop in loops(sass)]
    return [f"{a} reads and {b} writes of local memory in a loop" for a, b in found if a > reads or b > writes]


def loops(sass: str) -> list[str]:
    """The code of each loop over blocks: from a label to a conditional jump back to it, with products and no loop between.

    Waits spin at the end of the code and jump back unconditionally.
    """
    labels, found = {}, []
    for match in re.finditer(r"^(\.L_\w+):|@!?U?P\d\s+BRA `\((\.L_\w+)\)", sass, re.MULTILINE):
        label, target = match.groups()
        if label:
            labels[label] = match.end()
        elif "HGMMA" in sass[labels.get(target, match.start()) : match.start()]:
            found.append((labels[target], match.start()))
    innermost = [loop for loop in found if not any(loop[0] <= a and b < loop[1] for a, b in found)]
    return [sass[begin:end] for begin, end in innermost]


def warps_and_instructions(ptx: str, sass: str, least_of: dict[str, int]) -> list[str]:
    """What is wrong with registers and threads, and instructions that are missing."""
    wrong = []
    given = {int(number) for number in re.findall(r"setmaxnreg\.(?:inc|dec)\.sync\.aligned\.u32\s+(\d+)", ptx)}
    if not {CONSUMER_REGISTERS, PRODUCER_REGISTERS} <= given:
        wrong.append(f"setmaxnreg gives {sorted(given)}")
    threads = re.search(r"\.reqntid (\d+)", ptx)
    if threads is None or int(threads.group(1)) != THREADS or f".maxnreg {REGISTERS}" not in ptx:
        wrong.append(f"not {THREADS} threads of {REGISTERS} registers")
    for name, least in least_of.items():
        found = len(re.findall(rf"\b{name}\b", sass))
        if found < least:
            wrong.append(f"{found} {name}")
    return wrong


def exponentials(sass: str) -> list[tuple[int, int]]:
    """For each block's softmax: how many exponentials stand before the wait for the sums, and how many after."""
    found, waits = [], 0
    for name in re.findall(rf"HGMMA|MUFU\.EX2|{SCORES}|{SUMS}", sass):
        if name == SCORES:
            found.append([0, 0])
            waits = 1
        elif name == SUMS:
            waits = 2 if waits == 1 else 0
        elif name == "HGMMA":
            waits = 0
        elif waits:
            found[-1][waits - 1] += 1
    return [tuple(counts) for counts in found]


def disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run((str(tool), "-c", file.name), capture_output=True, text=True, check=True).stdout
