"""What this process may use of the machine: processors and memory, the container's limits included.

``docker run --cpus 2 -m 2g`` shows in the control group's files alone; the host's figures would
start 64 threads on two processors and a pool that the kernel kills.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger

_ROOT = Path("/")
_LOWER_PRIORITY = 5  # added to the nice value
logger = init_logger(__name__)


def usable_threads(root: Path = _ROOT) -> int:
    """Processors this process may run on: its affinity, cut to the control group's quota."""
    limit = len(os.sched_getaffinity(0))
    for group in _groups(root, "cpu"):
        quota = _cpu_quota(group)
        if quota is not None:
            limit = min(limit, max(1, math.floor(quota)))
    return limit


def freeze_heap() -> None:
    """Exempt all objects that live now from garbage collection.

    Call it in a process of one's own when it has loaded what it keeps: a full collection visits
    each of a few hundred thousand objects, and all threads stand still for a tenth of a second.
    """
    gc.collect()
    gc.freeze()


def lower_priority() -> None:
    """Let the calling thread have a third of a processor that a thread of the engine also wants.

    For work of one request that may take long and does not hold the interpreter's lock: where all
    processors are computing, steps would otherwise take up to twice as long while it lasts. A
    thread cannot have its old priority back without a privilege, so it does nothing else.
    """
    if sys.platform == "linux":  # elsewhere a priority belongs to a process, not to a thread
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.nice(_LOWER_PRIORITY)


def run_when_idle() -> None:
    """Let the calling thread run only where no other thread wants a processor.

    As ``lower_priority``, for work that may wait: a step lasts as long beside it as without it
    (measured 1.15 times as long on two processors, and 1.7 times beside a nice value of 10, because
    a thread of the engine that wakes up waits for the end of the other's time slice).
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # as above
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def bind_processors(choice: str, root: Path = _ROOT) -> None:
    """Let all threads of this process, and those it starts later, run on some processors only.

    Args:
        choice: as ``chosen_processors`` takes it; "none" changes nothing.
        root: where proc and sys lie.

    Raises:
        ConfigError: see ``chosen_processors``.
    """
    if choice == "none":
        return
    processors = chosen_processors(choice, os.sched_getaffinity(0), root)
    for task in (root / "proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(int(task.name), processors)
    logger.info("compute threads run on processors %s", ",".join(map(str, sorted(processors))))


def chosen_processors(choice: str, allowed: set[int], root: Path = _ROOT) -> set[int]:
    """Return the processors of a choice.

    Args:
        choice: a list such as "0-3,8", or "auto": of the NUMA node with the most cores the lowest
            processor of each core.
        allowed: processors that this process may run on.
        root: where sys lies.

    Raises:
        ConfigError: some processor of the list is not allowed.
    """
    if choice != "auto":
        listed = _listed(choice)
        if not listed:
            raise ConfigError(f"cpu_bind: {choice} names no processor; write 0-3,8, auto or none")
        if refused := sorted(listed - allowed):
            raise ConfigError(
                f"cpu_bind: this process may not run on processor {refused[0]}; it may on "
                f"{','.join(map(str, sorted(allowed)))}"
            )
        return listed
    system = root / "sys/devices/system"
    cores: dict[frozenset[int], int] = {}  # processors of a core -> the lowest allowed
    for processor in sorted(allowed):
        siblings = _read_list(system / f"cpu/cpu{processor}/topology/thread_siblings_list")
        cores.setdefault(frozenset(siblings or {processor}), processor)
    firsts = set(cores.values())
    nodes = [_read_list(path) & firsts for path in sorted(system.glob("node/node*/cpulist"))]
    return max((node for node in nodes if node), key=len, default=firsts)


def check_threads(threads: int | None, cpu_bind: str) -> None:
    """Refuse more compute threads than processors: threads that wait for others would stop them.

    Args:
        threads: None is one for each processor.
        cpu_bind: as ``chosen_processors`` takes it; "none" is all that this process may run on.

    Raises:
        ConfigError: see ``chosen_processors``, or there are too many threads.
    """
    processors = os.sched_getaffinity(0)
    if cpu_bind != "none":
        processors = chosen_processors(cpu_bind, processors)
    if threads is not None and threads > len(processors):
        raise ConfigError(
            f"threads: {threads} are more than the {len(processors)} processors that may compute; "
            "leave it out to use them all"
        )


def _listed(text: str) -> set[int]:
    """Numbers of "0-3,8"; a range whose end is before its start has none."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _read_list(path: Path) -> set[int]:
    try:
        return _listed(path.read_text())
    except (OSError, ValueError):
        return set()


def memory_left(root: Path = _ROOT) -> int:
    """Bytes that can still be allocated before the kernel steps in; page cache counts as free."""
    left = _meminfo(root, "MemAvailable")
    for group in _groups(root, "memory"):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes")
        if limit is not None:
            left = min(left, limit - (used or 0) + _file_cache(group / "memory.stat"))
    return max(left, 0)


def memory_limit(root: Path = _ROOT) -> int:
    """Bytes of memory and swap that this process could use if nothing else ran."""
    limit = _meminfo(root, "MemTotal") + _meminfo(root, "SwapTotal")
    for group in _groups(root, "memory"):
        cap = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        limit = min(limit, cap or limit)
    return limit


def cache_folder() -> Path:
    """$CHUNKLLAMA_CACHE, else chunkllama/ below $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ConfigError: none is set, and the user has no home.
    """
    if own := os.environ.get("CHUNKLLAMA_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "chunkllama"
    except RuntimeError:
        raise ConfigError("this user has no home folder; set CHUNKLLAMA_CACHE") from None


def cpu_name(root: Path = _ROOT) -> str:
    """Return the processor's name; on ARM, which has none, its implementer and part numbers."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = dict([part.strip() for part in line.split(":", 1)] for line in lines if ":" in line)
    if "model name" in fields:
        return fields["model name"]
    numbers = [fields[key] for key in ("CPU implementer", "CPU part") if key in fields]
    return " ".join([platform.machine(), *numbers])


def default_kv_cache_memory(left: int, useful: int) -> int:
    """Return the default bytes of the chunk pool on a CPU: a quarter of what is left.

    Args:
        left: bytes free once the weights are loaded.
        useful: what the largest number of requests needs at their longest.
    """
    return min(useful, left // 4)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and its ancestors, version 2 and version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = base / path.lstrip("/")
        while folder.is_relative_to(base):
            yield folder
            folder = folder.parent


def _cpu_quota(group: Path) -> float | None:
    """Processors' worth of time per period; None without a limit."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        old, period_old = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        return old / period_old if old and period_old and old > 0 else None


def _number(path: Path) -> int | None:
    """A file's number; None for a missing file, for "max" and for version 1's "no limit"."""
    try:
        value = int(path.read_text())
    except (OSError, ValueError):
        return None
    return value if value < 1 << 60 else None


def _file_cache(stat: Path) -> int:
    try:
        fields = dict(line.split() for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("inactive_file", fields.get("total_inactive_file", 0)))


def _meminfo(root: Path, field: str) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, value, *_ = line.split()
        if name == f"{field}:":
            return int(value) * 1024
    if field == "SwapTotal":  # a kernel without swap
        return 0
    raise OSError(f"/proc/meminfo has no {field}")


def data_folder(name: str) -> Path:
    """Return the folder ``kernels`` or ``configs``, of the installed package or the repository."""
    package = Path(__file__).resolve().parent
    for folder in (package / f"_{name}", package.parent / name):
        if folder.is_dir():
            return folder
    raise ConfigError(f"the package holds no {name} folder: reinstall chunkllama")
