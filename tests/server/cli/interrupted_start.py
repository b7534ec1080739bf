"""Runs ``chunkllama serve`` and sends itself a signal at one named moment of the start.

A moment is the import of a module, a file that is opened, a socket that is bound, a process that
is started or a log record. ``python interrupted_start.py SIGNAL MOMENT FLAGS...``; with SIGNAL 0
the moments up to "ready at" are written to the file MOMENT instead.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys

MISSED = 99  # exit code: the server became ready and the moment did not occur
_EVENTS = {"import": 0, "open": 0, "socket.bind": None, "subprocess.Popen": None}


class Watch:
    """Names each moment once and acts at the one that was asked for."""

    def __init__(self, number: int, moment: str) -> None:
        self._number = number
        self._moment = moment
        self._seen: set[str] = set()
        self._begun = False
        if number == 0:
            self._record = os.open(moment, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if event in _EVENTS:
            position = _EVENTS[event]
            self.reach(event if position is None else f"{event} {arguments[position]}")

    def log(self, *arguments: object, **fields: object) -> logging.LogRecord:
        record = logging.LogRecord(*arguments, **fields)
        self.reach(f"log {record.msg}")
        if record.msg.startswith("ready at"):
            if self._number == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(MISSED)
        return record

    def reach(self, name: str) -> None:
        self._begun = self._begun or name == "import chunkllama_server.commands"
        if not self._begun or name in self._seen:
            return
        self._seen.add(name)
        if self._number == 0:
            os.write(self._record, f"{name}\n".encode())
        elif name == self._moment:
            _Sender(self._number)  # and deletes it at once


class _Sender:
    """Sends the signal while a finalizer runs, where Python ignores exceptions."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self._number)


def main() -> None:
    watch = Watch(int(sys.argv[1]), sys.argv[2])
    sys.argv = ["chunkllama", "serve", *sys.argv[3:]]
    logging.setLogRecordFactory(watch.log)
    sys.addaudithook(watch.audit)
    runpy.run_module("chunkllama_server.cli", run_name="__main__")


if __name__ == "__main__":
    main()
