"""Which processors compute (``cpu_bind``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from chunkllama.config import ModelConfig
from chunkllama.errors import ConfigError
from chunkllama.resources import chosen_processors


def machine(root: Path, cores: list[str], nodes: list[str]) -> Path:
    """A tree of /sys: lists of the processors of each core and of each node."""
    system = root / "sys/devices/system"
    for core in cores:
        for processor in core.split(","):
            folder = system / f"cpu/cpu{processor}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(core + "\n")
    for number, node in enumerate(nodes):
        folder = system / f"node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(node + "\n")
    return root


@pytest.mark.parametrize(
    ("choice", "processors"),
    [("0", {0}), ("0-3,8", {0, 1, 2, 3, 8}), ("2,2-2", {2}), ("10,0-1", {0, 1, 10})],
)
def test_a_list(choice: str, processors: set[int], tmp_path: Path) -> None:
    assert chosen_processors(choice, set(range(16)), tmp_path) == processors


def test_a_list_beyond_what_the_process_may_use() -> None:
    with pytest.raises(ConfigError, match=r"may not run on processor 4; it may on 0,2,3"):
        chosen_processors("2-4,9", {0, 2, 3})
    with pytest.raises(ConfigError, match="3-1 names no processor"):
        chosen_processors("3-1", {0, 1, 2, 3})


def test_auto_takes_a_processor_of_each_core_of_the_largest_node(tmp_path: Path) -> None:
    """Siblings are i and i + 6. Of nodes with as many cores the first counts."""
    root = machine(tmp_path, [f"{i},{i + 6}" for i in range(6)], ["0-2,6-8", "3-5,9-11"])
    assert chosen_processors("auto", set(range(12)), root) == {0, 1, 2}
    assert chosen_processors("auto", set(range(2, 12)), root) == {2, 6, 7}
    assert chosen_processors("auto", {1, 3, 4, 7, 9}, root) == {3, 4}
    assert chosen_processors("auto", {1, 7, 9, 10}, root) == {9, 10}
    assert chosen_processors("auto", {8}, root) == {8}


def test_auto_without_topology_takes_all(tmp_path: Path) -> None:
    assert chosen_processors("auto", {0, 1, 5}, tmp_path) == {0, 1, 5}


@pytest.mark.parametrize("value", ["all", "0-", "-1", "0;1", "0,,1", "123456", ""])
def test_what_is_no_list_is_refused(value: str) -> None:
    with pytest.raises(ValidationError, match="cpu_bind"):
        ModelConfig(model="m", cpu_bind=value)


def test_a_number_in_yaml_is_a_list() -> None:
    assert ModelConfig(model="m", cpu_bind=0).cpu_bind == "0"  # type: ignore[arg-type]


def test_threads_that_exist_and_new_ones_are_bound() -> None:
    processor = min(os.sched_getaffinity(0))
    code = f"""
import os, threading
from chunkllama.resources import bind_processors, usable_threads
before, asked, answers = os.sched_getaffinity(0), threading.Event(), []
def note():
    asked.wait()
    answers.append(os.sched_getaffinity(0))
earlier = threading.Thread(target=note)
earlier.start()
bind_processors("none")
assert os.sched_getaffinity(0) == before
bind_processors("{processor}")
later = threading.Thread(target=note)
later.start()
asked.set()
earlier.join()
later.join()
assert answers == [{{{processor}}}] * 2, answers
assert usable_threads() == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
