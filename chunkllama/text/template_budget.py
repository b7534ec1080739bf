"""What one rendering of a chat template may use."""

from __future__ import annotations

import time

import jinja2

from chunkllama.rests import rest


class TemplateLimitError(jinja2.TemplateError):
    """The template used up its time or its memory."""


class TemplateBudget:
    """What one rendering may still use: seconds of its thread's own time, so that a busy machine
    stops no template, and sizes in characters, a list element counting as eight."""

    def __init__(self, seconds: float, work: int, output: int) -> None:
        self.seconds = seconds
        self.end = time.thread_time() + seconds
        self.look_at = time.monotonic() + seconds
        self.work = work
        self.output = output

    def tick(self) -> None:
        rest()
        now = time.monotonic()  # a tenth of the cost of the thread's time
        if now > self.look_at:
            left = self.end - time.thread_time()
            if left <= 0:
                raise TemplateLimitError(f"it ran longer than {self.seconds:g} s")
            self.look_at = now + left

    def charge(self, size: int) -> None:
        self.tick()
        self.work -= size
        if self.work < 0:
            raise TemplateLimitError("it built more text than any prompt needs")

    def emit(self, size: int) -> None:
        self.charge(size)
        self.output -= size
        if self.output < 0:
            raise TemplateLimitError("its output is out of proportion to the conversation")
