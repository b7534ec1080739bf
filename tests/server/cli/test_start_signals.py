"""A signal at any moment of a start ends it: exit code, no traceback, no process left.

The moments are facts of the start (imports, files, sockets, processes, log records), not times.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).with_name("interrupted_start.py")
CODES = {signal.SIGTERM: 0, signal.SIGHUP: 0, signal.SIGINT: 130}
# Reached in every start; the sweep always has them.
LANDMARKS = ("socket.bind", "subprocess.Popen", "log loading %s", "log ready at %s://%s:%d")


def begin(number: int, moment: str, model: Path) -> subprocess.Popen[str]:
    flags = ["--model", str(model), "--port", "0", "--num-chunks", "64", "--backend", "reference"]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(number), moment, *flags],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def in_session(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session and process.pid != session:
                found.append(process)
    return found


@pytest.fixture(scope="module")
def moments(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of a start's moments in order, those alone that every start has."""
    record = tmp_path_factory.mktemp("moments") / "names"
    process = begin(0, str(record), tiny_model)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    names = record.read_text().splitlines()
    # A module (.py, .pyc) is opened, and compiled, in a first start alone.
    return [n for n in names if not n.startswith(("open /proc/", "open /dev/")) and ".py" not in n]


def check(number: signal.Signals, moment: str, model: Path) -> None:
    process = begin(number, moment, model)
    _, log = process.communicate(timeout=120)
    what = f"{number.name} at {moment!r}: exit code {process.returncode}\n{log}"
    assert process.returncode == CODES[number], what
    assert "Traceback" not in log and "Exception ignored" not in log, what
    assert "ready at" not in log, what
    assert not in_session(process.pid), what


def spread(names: list[str], count: int) -> list[str]:
    """``count`` moments evenly over the start, and the landmarks."""
    chosen = {names[i * (len(names) - 1) // (count - 1)] for i in range(count)}
    landmarks = {name for name in names if name.startswith(LANDMARKS)}
    assert len(landmarks) == len(LANDMARKS), landmarks
    return [name for name in names if name in chosen | landmarks]


def test_a_start_ends_at_a_signal(tiny_model, moments) -> None:
    numbers = list(CODES)
    for position, moment in enumerate(spread(moments, 5)):
        check(numbers[position % len(numbers)], moment, tiny_model)


@pytest.mark.nightly
@pytest.mark.parametrize("number", CODES)
def test_a_start_ends_at_a_signal_in_60_moments(tiny_model, moments, number) -> None:
    chosen = spread(moments, 60)
    assert len(chosen) >= 50
    for moment in chosen:
        check(number, moment, tiny_model)


def test_a_hangup_ignored_by_the_caller_stays_ignored() -> None:
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from chunkllama_server.process import start_signals; start_signals.install()\n"
        "signal.raise_signal(signal.SIGHUP); print('alive', flush=True)\n"
        "signal.raise_signal(signal.SIGTERM); print('not reached')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_a_fetch_is_unwound_even_if_the_exception_is_lost(tmp_path: Path) -> None:
    """Temporary files are removed; an exception lost in a finalizer is raised at the end."""
    code = (
        "import signal, sys, tempfile\n"
        "from chunkllama_server.process import start_signals; start_signals.install()\n"
        "class Sender:\n"
        "    def __del__(self): signal.raise_signal(signal.SIGTERM)\n"
        "with start_signals.unwinding(), tempfile.TemporaryDirectory(dir=sys.argv[1]):\n"
        "    signal.raise_signal(signal.SIGTERM) if sys.argv[2] == 'plain' else Sender()\n"
        "    print(sys.argv[2], flush=True)\n"
        "print('not reached', flush=True)"
    )
    for how, expected in (("plain", ""), ("lost", "lost\n")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), how],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
        assert list(tmp_path.iterdir()) == []
