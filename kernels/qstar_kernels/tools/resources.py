"""``python -m qstar_kernels.tools.resources``: what every kernel and tile of the tables takes of a card, without it.

Each is compiled for every architecture, in a process of its own, since some of the compiler's asserts end the process.
``--write FILE`` puts the table between the two marks in FILE instead of printing it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import triton
from triton.compiler import CompiledKernel

from qstar_kernels.common.launch import TARGETS, Tile
from qstar_kernels.lm_head import cases as lm_head
from qstar_kernels.thought_attention import cases as thought_attention

# Each has KERNELS, WIDTHS, TABLE, Shape(width), build_launch(kernel, architecture, dtype, shape, rules=) and
# rivals(kernel, architecture, dtype, width), and for ``tune`` candidates(tile), largest_served(width) and
# errors(kernel, dtype, width, device).
PROVIDERS = {"thought_attention": thought_attention, "lm_head": lm_head}

DTYPES = ("bfloat16", "float32")  # one of each size; float16 takes what bfloat16 does
SHARED_LIMITS = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
NEVER_SPILLS = ("sm_90", "sm_100")
INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "mfma")  # of tensor cores
PRODUCTS = {"tt.dot": "ttir", "ttng.warp_group_dot": "ttgir"}  # their names, and the stage of the compiler to look at
RESULT = re.compile(r"\s*(?:@!?%p\d+ )?([\w.]+)\s+(%\w+)(?:\|%p\d+)?, (.*);")  # of an instruction in PTX
MARKS = ("<!-- resources: begin -->", "<!-- resources: end -->")
HEADER = (
    "| kernel | dtype | width | tile | registers | spilled | shared memory | products by |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Case:
    """A kernel with a tile, to be compiled for an architecture."""

    op: str
    kernel: str
    architecture: str
    dtype: str
    width: int
    tile: Tile
    rules: bool = False

    def __str__(self) -> str:
        tile = f"{self.tile.rows}x{self.tile.keys}, {self.tile.warps} warps, {self.tile.stages} stages"
        rules = " with every rule" if self.rules else ""
        return f"{self.kernel}{rules} on {self.architecture}, {self.dtype}, width {self.width}, {tile}"


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes. Bytes of stack hold what did not fit into registers, and local arrays."""

    registers: int = 0
    spilled: int = 0  # bytes of stack; on AMD registers
    shared: int = 0
    products: tuple[str, ...] = ()  # what makes them: of INSTRUCTIONS, or "fma"; nothing where there are none
    serialized: bool = False  # the assembler makes asynchronous products wait for one another
    contracted: bool = False  # one instruction multiplies and adds what another lane holds
    seconds: float = 0.0
    error: str | None = None


def table_cases(architecture: str) -> Iterator[Case]:
    """The tiles of every op's table, each at the largest width that it serves, and with every rule at a middle one;
    and those of kernels that may take the place of others.
    """
    for op, provider in PROVIDERS.items():
        middle = provider.WIDTHS[len(provider.WIDTHS) // 2]
        for dtype in DTYPES:
            for width, rules in [*((width, False) for width in provider.WIDTHS), (middle, True)]:
                for kernel in provider.KERNELS:
                    yield find_case(op, kernel, architecture, dtype, width, rules)
                    if not rules:
                        for rival, tiles in provider.rivals(kernel, architecture, getattr(torch, dtype), width).items():
                            yield from (Case(op, rival, architecture, dtype, width, tile) for tile in tiles)


def find_case(op: str, kernel: str, architecture: str, dtype: str, width: int, rules: bool = False) -> Case:
    """The case with the table's tile."""
    tile = PROVIDERS[op].TABLE.find(kernel, architecture, getattr(torch, dtype), width)
    return Case(op, kernel, architecture, dtype, width, tile, rules)


def complaints(case: Case, found: Resources) -> list[str]:
    """What is wrong with the resources of a case, if anything."""
    if found.error:
        return [f"{case}: {found.error}"]
    wrong = []
    if case.architecture in NEVER_SPILLS and found.spilled:
        wrong.append(f"{case}: {found.spilled} bytes of stack")
    limit = SHARED_LIMITS[case.architecture]
    if found.shared > limit:
        wrong.append(f"{case}: {found.shared} bytes of shared memory, the card has {limit}")
    if found.serialized:
        wrong.append(f"{case}: the assembler serializes its products")
    if found.contracted:
        wrong.append(f"{case}: lanes that share a sum may end with different bits, and which are stored is chance")
    if case.architecture == "sm_90" and case.dtype != "float32" and set(found.products) - {"wgmma"}:
        wrong.append(f"{case}: products by {', '.join(found.products)}, not by wgmma alone")
    return wrong


def compile_case(case: Case) -> Resources:
    provider = PROVIDERS[case.op]
    start = cpu_seconds()
    with provider.TABLE.trying(case.kernel, case.tile):
        launch = provider.build_launch(
            case.kernel, case.architecture, getattr(torch, case.dtype), provider.Shape(case.width), rules=case.rules
        )
    try:
        compiled = launch.compile(case.architecture)
    except Exception as error:
        while error.__cause__:  # the last says what is wrong, the others where
            error = error.__cause__
        return Resources(error=f"{type(error).__name__}: {str(error).strip()[-500:]}")
    seconds = cpu_seconds() - start
    used = nvidia_usage(compiled) if "cubin" in compiled.asm else amd_usage(compiled)
    serialized = launch.language == "gluon" and is_serialized(compiled)
    contracted = bool(contracted_sums(compiled.asm.get("ptx", "")))
    return Resources(*used, compiled.metadata.shared, products_of(compiled), serialized, contracted, seconds)


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended, the assembler among them."""
    return sum(os.times()[:4])


def nvidia_usage(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers and bytes of stack, as the tool that comes with Triton reads them in the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = run_tool("cuobjdump", "--dump-resource-usage", file.name)
    return tuple(int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))


def is_serialized(compiled: CompiledKernel) -> bool:
    """Whether the assembler says (C75xx) that it had to add waits between asynchronous products."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        return "(C75" in run_tool("ptxas", "-v", f"-arch={architecture}", "-o", f"{folder}/kernel.cubin", source)


def contracted_sums(ptx: str) -> list[str]:
    """Instructions that multiply and add what came from another lane, see ``rounded_product``."""
    moved, found = set(), []
    for line in ptx.splitlines():
        if match := RESULT.match(line):
            operation, result, operands = match.groups()
            sources = [operand.strip() for operand in operands.split(",")]
            if operation.startswith("shfl") or (operation.startswith("mov.") and sources[0] in moved):
                moved.add(result)
            elif operation.startswith("fma") and moved.intersection(sources):
                found.append(line.strip())
    return found


def run_tool(name: str, *arguments: str | Path) -> str:
    """What one of the tools that come with Triton prints."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([tool, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def amd_usage(compiled: CompiledKernel) -> tuple[int, int]:
    """Vector registers, and how many of them are spilled."""
    text = compiled.asm["amdgcn"]
    return tuple(int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))


def products_of(compiled: CompiledKernel) -> tuple[str, ...]:
    if not any(name in compiled.asm[stage] for name, stage in PRODUCTS.items() if stage in compiled.asm):
        return ()
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return tuple(name for name in INSTRUCTIONS if name in text) or ("fma",)


def measure(cases: Iterable[Case], workers: int = 2) -> Iterator[tuple[Case, Resources]]:
    """Compile the cases, ``workers`` at a time, and yield each when it is done.

    From another interpreter: this one may run the kernels with TRITON_INTERPRET, and then cannot compile them.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qstar_kernels.tools.resources", "--compile", "--workers", str(workers)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        process.stdin.writelines(json.dumps(asdict(case)) + "\n" for case in cases)
        process.stdin.close()
        for line in process.stdout:
            case, found = json.loads(line)
            yield read_case(case), Resources(**found | {"products": tuple(found["products"])})
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")


def read_case(values: dict) -> Case:
    return Case(**values | {"tile": Tile(**values["tile"])})


def serve(workers: int) -> None:
    """Compile the cases that standard input lists, and write each with its resources, a line of JSON, when done."""
    fork = multiprocessing.get_context("fork")
    waiting, running = [read_case(json.loads(line)) for line in sys.stdin], {}
    while waiting or running:
        while waiting and len(running) < workers:
            case = waiting.pop(0)
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=_send_resources, args=(sender, case))
            process.start()
            sender.close()
            running[receiver] = case, process
        for receiver in wait(list(running)):
            case, process = running.pop(receiver)
            try:
                found = receiver.recv()
            except EOFError:
                process.join()
                found = Resources(error=f"the compiler ended its process with exit code {process.exitcode}")
            print(json.dumps([asdict(case), asdict(found)]), flush=True)


def _send_resources(sender: Connection, case: Case) -> None:
    sender.send(compile_case(case))


def format_tables(measured: dict[Case, Resources]) -> str:
    """A Markdown table for each card, folded."""
    tables = []
    for architecture in dict.fromkeys(case.architecture for case in measured):
        rows = [format_row(case, found) for case, found in measured.items() if case.architecture == architecture]
        lines = ["<details>", f"<summary>{architecture}</summary>", "", *HEADER, *rows, "", "</details>"]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def format_row(case: Case, found: Resources) -> str:
    tile = f"{case.tile.rows}x{case.tile.keys} w{case.tile.warps} s{case.tile.stages}"
    kernel = f"`{case.kernel}`" + (", every rule" if case.rules else "")
    products = ", ".join(found.products) or "none"
    cells = (kernel, case.dtype, case.width, tile, found.registers, found.spilled, found.shared, products)
    return f"| {' | '.join(map(str, cells))} |"


def write_between_marks(path: Path, tables: str) -> None:
    text = path.read_text()
    if [text.count(mark) for mark in MARKS] != [1, 1]:
        raise SystemExit(f"{path} must have the lines {MARKS[0]} and {MARKS[1]} once")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    path.write_text(f"{before}{MARKS[0]}\n{tables}\n{MARKS[1]}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qstar_kernels.tools.resources", description=__doc__)
    parser.add_argument("--architectures", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--write", type=Path, metavar="FILE", help="a file with the two marks")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        serve(arguments.workers)
        return 0

    cases = [case for architecture in arguments.architectures for case in table_cases(architecture)]
    measured = dict(measure(cases, arguments.workers))
    tables = format_tables({case: measured[case] for case in cases})
    if arguments.write:
        write_between_marks(arguments.write, tables)
    else:
        print(tables)
    print(f"{sum(found.seconds for found in measured.values()):.0f} s of processor time", file=sys.stderr)
    wrong = [line for case in cases for line in complaints(case, measured[case])]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
