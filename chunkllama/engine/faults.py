"""Fault points of an engine process: failures that a test plants, at places that it names.

``CHUNKLLAMA_FAULTS`` holds ``POINT:ACTION@WHEN`` entries, separated by commas, for example
``step:kill@37,commit:raise@p=0.01``. It is refused unless ``CHUNKLLAMA_TEST_MODE`` is 1.

    POINT   step      a step is about to be executed
            commit    it was executed and is about to be committed
            send      it was committed, and its tokens are about to be sent
    ACTION  kill      SIGKILL to itself
            stop      SIGSTOP to itself
            raise     an exception
            memory    MemoryError
            spin      a loop without end, which uses a processor
    WHEN    N         the N-th passage in each process
            p=X       each passage with probability X
            file=PATH the next passage after the file PATH was created, which is deleted then
            file=PATH+N
                      the N-th passage after that one
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from chunkllama.errors import ConfigError

VARIABLE, TEST_MODE = "CHUNKLLAMA_FAULTS", "CHUNKLLAMA_TEST_MODE"
POINTS = ("step", "commit", "send")
ACTIONS = ("kill", "stop", "raise", "memory", "spin")
_ENTRY = re.compile(
    r"(\w+):(\w+)@(?:([0-9]{1,18})|p=([0-9]*\.?[0-9]+)|file=(.+?)(?:\+([0-9]{1,18}))?)"
)


class PlantedFault(Exception):
    """What the action ``raise`` raises."""


@dataclass(slots=True)
class _Fault:
    point: str
    action: str
    passage: int
    probability: float
    file: str
    delay: int
    countdown: int = -1  # passages until it is due; negative: its file was not seen

    def sees_file(self) -> bool:
        """Whether it is due at this passage because of its file."""
        if self.countdown < 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.file)
                self.countdown = self.delay
        else:
            self.countdown -= 1
        if self.countdown:
            return False
        self.countdown = -1
        return True


class Faults:
    """The faults of one process.

    Raises:
        ConfigError: an entry cannot be read.
    """

    def __init__(self, text: str) -> None:
        self._faults = [_parse(entry.strip()) for entry in text.split(",") if entry.strip()]
        self._passages: Counter[str] = Counter()
        self._random = random.Random(os.getpid())

    def reach(self, point: str) -> None:
        """Fail here if a fault is due at this passage of ``point``."""
        self._passages[point] += 1
        for fault in self._faults:
            if fault.point == point and self._is_due(fault):
                _act(fault)

    def _is_due(self, fault: _Fault) -> bool:
        if fault.passage:
            return self._passages[fault.point] == fault.passage
        if fault.file:
            return fault.sees_file()
        return self._random.random() < fault.probability


def faults_from(environ: Mapping[str, str] = os.environ) -> Faults | None:
    """The faults that the environment plants, None without any.

    Raises:
        ConfigError: outside test mode, or an entry cannot be read.
    """
    text = environ.get(VARIABLE, "")
    if not text:
        return None
    if environ.get(TEST_MODE) != "1":
        raise ConfigError(
            f"{VARIABLE}: plants failures for tests and is refused unless {TEST_MODE}=1; unset it"
        )
    return Faults(text)


def _parse(entry: str) -> _Fault:
    match = _ENTRY.fullmatch(entry)
    if match is None or match[1] not in POINTS or match[2] not in ACTIONS:
        raise ConfigError(
            f"{VARIABLE}: cannot read {entry[:100]!r}; write POINT:ACTION@N, POINT:ACTION@p=X or "
            f"POINT:ACTION@file=PATH with a point of {', '.join(POINTS)} and an action of "
            f"{', '.join(ACTIONS)}"
        )
    passage, probability, file, delay = match.group(3, 4, 5, 6)
    return _Fault(
        match[1],
        match[2],
        int(passage or 0),
        float(probability or 0.0),
        file or "",
        int(delay or 0),
    )


def _act(fault: _Fault) -> None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise PlantedFault(f"planted at {fault.point}")
        case "memory":
            raise MemoryError(f"planted at {fault.point}")
        case _:
            _spin()


def _spin() -> NoReturn:
    while True:
        pass
