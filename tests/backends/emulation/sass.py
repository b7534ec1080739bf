"""Counts the instructions of a stage in the SASS of tpp_partial: what a warp issues for a full,
unmasked stage of a run.

The loop over stages has one path that such a stage takes; blocks that it leaves out (mask, loading
the queries' fragments, copies at the end of a run, rescaling) are recognized by what stands in
them.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from nvrtc import compiled_program

from chunkllama.backends.cuda.source import KernelSpec

Body = list[tuple[str, str]]  # ("label", name) or ("instruction", text)


def nvdisasm_path() -> Path | None:
    """nvdisasm of a CUDA toolkit or of the nvidia-cuda-nvdisasm wheel, or None."""
    if found := shutil.which("nvdisasm"):
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    return next((p for f in folders or () for p in Path(f).glob("*/bin/nvdisasm")), None)


def stage_instructions(
    arch: str, kernels: list[KernelSpec], sources: Path | None = None
) -> dict[KernelSpec, Counter[str]]:
    """Instructions of a steady stage by operation (HMMA, LDSM, ...), for each kernel."""
    nvdisasm = nvdisasm_path()
    assert nvdisasm is not None
    with (
        compiled_program(arch, kernels, sources=sources) as program,
        tempfile.NamedTemporaryFile(suffix=".cubin") as file,
    ):
        file.write(program.binary("CUBIN"))
        file.flush()
        names = {kernel: program.lowered_name(kernel) for kernel in kernels}
        listing = subprocess.run(
            [str(nvdisasm), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    bodies = _functions(listing)
    return {kernel: _steady_stage(bodies[name]) for kernel, name in names.items()}


def _functions(listing: str) -> dict[str, Body]:
    functions: dict[str, Body] = {}
    body: Body = []
    for line in listing.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.(\S+?),", line):
            body = functions.setdefault(found[1], [])
        elif found := re.match(r"(\.L_x_\d+):", line):
            body.append(("label", found[1]))
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            body.append(("instruction", found[1].strip()))
    return functions


def _operation(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _steady_stage(body: Body) -> Counter[str]:
    begin, end = _stage_loop(body)
    blocks = _blocks(body[begin : end + 1])
    copying = [block for block in blocks if any("LDGSTS" in text for text in block)]
    total: Counter[str] = Counter()
    for block in blocks:
        kinds = Counter(_operation(text).split(".")[0] for text in block)
        if not _is_left_out(block, kinds, len(copying) > 1):
            total += kinds
    return total


def _stage_loop(body: Body) -> tuple[int, int]:
    """The shortest backward branch around an HMMA."""
    places = {text: n for n, (kind, text) in enumerate(body) if kind == "label"}
    mma = [n for n, (_, text) in enumerate(body) if _operation(text).startswith("HMMA")]
    loops = []
    for n, (_, text) in enumerate(body):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)
        begin = places.get(target[1], n) if target else n
        if any(begin < m < n for m in mma):
            loops.append((begin, n))
    return min(loops, key=lambda loop: loop[1] - loop[0])


def _blocks(body: Body) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    for kind, text in body:
        if kind == "label":
            blocks.append([])
            continue
        blocks[-1].append(text)
        if re.search(r"\bBRA\b", text):
            blocks.append([])
    return blocks


def _is_left_out(block: list[str], kinds: Counter[str], two_ways_to_copy: bool) -> bool:
    if kinds["HMMA"]:
        return False
    masks = sum("-INF" in text for text in block) >= 4
    transposed = any("LDSM" in text and ".MT" in text for text in block)
    rescales = kinds["FMUL"] >= 8 and not kinds["FFMA"] and kinds["MUFU"] <= 1 and not transposed
    predicated = two_ways_to_copy and kinds["LDGSTS"] > 0 and kinds["ISETP"] >= 4
    return bool(masks or kinds["LDSM"] or rescales or predicated)
