"""Write requirements/*.txt: the packages that set-up and the image install, with hashes.

    python scripts/lock_requirements.py          needs uv; asks the package index
    python scripts/lock_requirements.py --keep   changes only what pyproject.toml no longer allows

Each file lists what it adds to the files it builds on (``LAYERS``); ``scripts/setup.sh`` and the
Dockerfile install them with ``pip install --no-deps --require-hashes``. cu13.txt has torch's
default build and the CUDA packages that it names. The others leave torch out: its CPU build and
its builds for CUDA 12 come from an index of their own.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "requirements"
# file: (extras of pyproject.toml, files it builds on)
LAYERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "serving": ((), ()),
    "examples": (("examples",), ("serving",)),
    "tools": (("examples", "dev"), ("serving", "examples")),
    "cu13": (("cu13",), ("serving",)),
}
WITH_TORCH = {"cu13"}
TORCH = "torch==2.13.0"


def lock(extras: tuple[str, ...], pins: str, *, with_torch: bool) -> dict[str, str]:
    """Resolve the project with ``extras``; returns the block of lines of each ``name==version``.

    Args:
        pins: lines of requirements that hold for the result.
        with_torch: list torch and what it requires, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        constraints, overrides = Path(folder) / "constraints.txt", Path(folder) / "overrides.txt"
        constraints.write_text(pins)
        overrides.write_text(TORCH)
        command = ["uv", "pip", "compile", "pyproject.toml", "--universal", "--generate-hashes"]
        command += ["--python-version", "3.11", "--no-header", "--no-annotate", "--quiet"]
        command += ["--constraint", str(constraints), "--override", str(overrides)]
        command += ["--no-config"] if with_torch else ["--no-emit-package", "torch"]
        for extra in extras:
            command += ["--extra", extra]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"uv could not resolve the packages: {run.stderr.strip()}")
    return read_blocks(run.stdout)


def read_blocks(text: str) -> dict[str, str]:
    """Split a requirements file into its blocks, by the first line without the continuation."""
    blocks: dict[str, str] = {}
    for block in re.split(r"\n(?=[a-z0-9])", text):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if lines:
            blocks[lines[0].removesuffix(" \\")] = "\n".join(lines) + "\n"
    return blocks


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep the pinned versions")
    keep = parser.parse_args().keep
    if shutil.which("uv") is None:
        sys.exit("uv is not installed: pip install uv")
    written: dict[str, dict[str, str]] = {}
    for name, (extras, bases) in LAYERS.items():
        path = FOLDER / f"{name}.txt"
        known = [line for base in bases for line in written[base]]
        if keep and path.exists():
            known += read_blocks(path.read_text())
        blocks = lock(extras, "\n".join(known), with_torch=name in WITH_TORCH)
        written[name] = {
            line: block
            for line, block in blocks.items()
            if not any(line in written[base] for base in bases)
        }
        head = "".join(f"# in addition to {base}.txt\n" for base in bases)
        body = "".join(written[name][line] for line in sorted(written[name]))
        path.write_text(f"# written by scripts/lock_requirements.py\n{head}{body}")
        print(f"{path.relative_to(ROOT)}: {len(written[name])} packages")


if __name__ == "__main__":
    main()
