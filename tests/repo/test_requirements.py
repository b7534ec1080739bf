"""The pinned packages agree with pyproject.toml and name no index."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PIN = re.compile(r"([a-z0-9.-]+)==(\S+)(?: ; ([^\\]+?))?(?: \\)?")


def pins(*names: str) -> dict[str, list[Version]]:
    """The pinned versions of each package in some of the files."""
    found: dict[str, list[Version]] = {}
    for name in names:
        for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
            if match := PIN.fullmatch(line):
                found.setdefault(match[1], []).append(Version(match[2]))
    return found


@pytest.mark.parametrize(
    ("files", "requirements"),
    [
        (("serving",), PROJECT["dependencies"]),
        (("serving", "examples"), EXTRAS["examples"]),
        (("serving", "examples", "tools"), EXTRAS["dev"]),
        (("serving", "cu13"), [*PROJECT["dependencies"], *EXTRAS["cu13"]]),
    ],
    ids=["serving", "examples", "tools", "cu13"],
)
def test_each_requirement_is_pinned_within_its_range(
    files: tuple[str, ...], requirements: list[str]
) -> None:
    pinned = pins(*files)
    for text in requirements:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name == "torch" and "cu13" not in files:
            continue  # scripts/setup.sh installs the build that fits the machine
        assert name in pinned, f"{text}: run scripts/lock_requirements.py --keep"
        for version in pinned[name]:
            assert requirement.specifier.contains(version, prereleases=True), f"{text} {version}"


# Packages that the code names without an import statement, and where.
NAMED = {
    "protobuf": "sentencepiece_model_pb2",  # generated code that needs it
    "fastapi-offline": '"fastapi_offline"',  # its files are served
}
# Packages whose undocumented parts are used, and where.
UNDOCUMENTED = {
    "uvicorn": r"uvicorn\.protocols\.http|\._serve\(",
    "h11": r"\(h11\.Connection\)",
    "transformers": r"transformers\.(masking_utils|modeling_outputs)",
    "tokenizers": r"__getstate__",
    "ray": r"^(from|import) ray|import ray",
}


def sources() -> str:
    folders = (ROOT / "chunkllama", ROOT / "server")
    return "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))


def test_each_dependency_is_used() -> None:
    text = sources()
    modules = set(re.findall(r"^\s*(?:import|from) ([a-z_0-9]+)", text, re.MULTILINE))
    used = {
        canonicalize_name(name)
        for module, names in packages_distributions().items()
        for name in names
        if module in modules - set(sys.stdlib_module_names)
    }
    wanted = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert {name for name in NAMED if NAMED[name] in text} == set(NAMED)
    assert wanted - used - set(NAMED) == set()


def test_a_package_with_undocumented_parts_in_use_has_an_upper_bound() -> None:
    text = sources()
    lines = [*PROJECT["dependencies"], *EXTRAS["ray"]]
    ranges = {Requirement(line).name.lower(): Requirement(line).specifier for line in lines}
    for name, use in UNDOCUMENTED.items():
        assert re.search(use, text, re.MULTILINE), f"{name}: {use} is no longer used"
        assert any(each.operator == "<" for each in ranges[name]), name


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").iterdir()), ids=lambda p: p.name)
def test_each_line_is_a_pin_with_hashes(path: Path) -> None:
    blocks = re.split(r"\n(?=[a-z0-9])", path.read_text())
    assert len(blocks) > 2
    for block in blocks[1:]:
        first, *hashes = block.splitlines()
        assert PIN.fullmatch(first), first
        assert hashes, first
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?", h) for h in hashes)
    assert "://" not in path.read_text()


def test_the_nightly_run_installs_litellms_proxy() -> None:
    """Its test fails without it, and its dependencies exclude the project's."""
    printed = subprocess.run(["make", "-n", "nightly", "VENV=none"], cwd=ROOT, capture_output=True)
    commands = printed.stdout.decode().splitlines()
    (proxy,) = [line for line in commands if "litellm[proxy]" in line]
    assert proxy.startswith('"none/litellm-proxy/bin/python" -m pip install')
