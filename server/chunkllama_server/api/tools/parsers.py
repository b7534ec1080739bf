"""Read tool calls out of the model's text as it streams.

A reader gets complete characters and tells content from calls. A call's name comes first, then its
arguments in pieces; text that turns out to be no call becomes content. However the text is cut, the
content and the calls are the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, Protocol

from chunkllama.text.partial_match import partial_end
from chunkllama_server.api.tools.brackets import SPACE
from chunkllama_server.api.tools.call_begins import BEGINS, CALL_TAGS, FORMS, LEAD
from chunkllama_server.api.tools.call_forms import CallForm, Functions, JsonCall, resolve_name
from chunkllama_server.api.tools.families import CallTags


@dataclass(frozen=True, slots=True)
class CallDelta:
    """Part of call number ``index``; ``name`` is set on its first part alone."""

    index: int
    name: str | None
    arguments: str


@dataclass(slots=True)
class Parsed:
    """What some text meant.

    Attributes:
        parts: content and parts of calls, in the order in which they were written.
    """

    parts: list[str | CallDelta] = field(default_factory=list)

    @property
    def content(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[CallDelta]:
        return [part for part in self.parts if isinstance(part, CallDelta)]

    def add(self, content: str) -> None:
        """Add content."""
        if content and self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += content
        elif content:
            self.parts.append(content)

    def extend(self, other: Parsed) -> None:
        """Add what the text behind this one meant."""
        for part in other.parts:
            if isinstance(part, str):
                self.add(part)
            else:
                self.parts.append(part)


class OutputParser(Protocol):
    """Splits one choice's text into content and tool calls."""

    def feed(self, text: str) -> Parsed:
        """Take the next text."""
        ...

    def finish(self) -> Parsed:
        """Return the text that was held back; no text follows."""
        ...


class PlainText:
    """All text is content."""

    def feed(self, text: str) -> Parsed:
        return Parsed([text] if text else [])

    def finish(self) -> Parsed:
        return Parsed()


# What Functionary writes before text, where it writes the name of a function before a call.
_TO_ALL = "all\n"


class _CallWriter:
    """Numbers calls and turns forms into deltas; calls beyond ``max_calls`` are dropped."""

    def __init__(self, max_calls: int | None) -> None:
        self._max_calls = max_calls
        self._index = -1
        self._announced = False

    @property
    def has_written(self) -> bool:
        return self._index >= 0

    def write(self, call: CallForm) -> list[CallDelta]:
        """New deltas of the current call; [] until its name is known."""
        if call.is_other:
            self._announced = False
            return []
        if call.name is None:
            return []
        deltas = []
        if not self._announced:
            self._announced = True
            self._index += 1
            deltas.append(CallDelta(self._index, call.name, ""))
        arguments = call.take_arguments()
        if arguments:
            deltas.append(CallDelta(self._index, None, arguments))
        if call.is_complete:
            self._announced = False
        if self._max_calls is not None and self._index >= self._max_calls:
            return []
        return deltas


# An opening of this length without a call is none: names have up to 64 characters.
_MAX_OPENING = 256
_WORD = re.compile(r"[\w.\-]+")
_State = Literal["start", "text", "open", "call", "after", "between"]


class CallReader:
    """Content and calls of one choice, in any form that models write them in.

    Args:
        functions: names that make a text a call, with their parameters.
        tags: what begins and ends calls; bare forms are read where the answer begins.
        hidden: tags that are special tokens, so they are never content.
        bare_python: a Python call needs neither tag nor bracket.
        forced: a grammar guarantees calls, so nothing is content.
        max_calls: calls beyond this are dropped; None is no limit.
        addressed: text begins with the line "all", as a call does with a name.
    """

    def __init__(
        self,
        functions: Functions,
        tags: CallTags,
        *,
        hidden: frozenset[str] = frozenset(),
        bare_python: bool = False,
        forced: bool = False,
        max_calls: int | None = None,
        addressed: bool = False,
    ) -> None:
        self._addressed = addressed
        self._functions = functions
        self._tags = tags
        self._hidden = hidden
        self._bare_python = bare_python
        self._forced = forced
        self._writer = _CallWriter(max_calls)
        self._state: _State = "start"
        self._text = ""
        self._lead = ""
        self._call: CallForm | None = None
        self._text_tags = (*tags.opens, *hidden.difference(tags.opens))

    def feed(self, text: str) -> Parsed:
        parsed = Parsed()
        self._text += text
        steps = {
            "start": self._begin_answer,
            "text": self._read_text,
            "open": self._begin_call,
            "call": self._read_call,
            "after": self._end_call,
            "between": self._end_call,
        }
        while self._text and steps[self._state](parsed):
            pass
        return self._without_text(parsed)

    def _without_text(self, parsed: Parsed) -> Parsed:
        """What was parsed; of forced calls nothing is content."""
        return Parsed([*parsed.calls]) if self._forced else parsed

    def _reads_address(self, stripped: str) -> bool | None:
        """Remove the line before text; None where more text tells whether it is one."""
        if not self._addressed:
            return False
        if not stripped.startswith(_TO_ALL):
            return None if _TO_ALL.startswith(stripped) else False
        self._text = stripped[len(_TO_ALL) :]
        self._lead, self._state = "", "text"
        return True

    def _begin_answer(self, parsed: Parsed) -> bool:
        """A call without tags, else text."""
        stripped = self._text.lstrip(SPACE)
        if (read := self._reads_address(stripped)) is not False:
            return bool(read)
        if not stripped or any(t != stripped and t.startswith(stripped) for t in self._tags.opens):
            return False
        if any(stripped.startswith(tag) for tag in self._tags.opens):
            # White space before a call is no content.
            self._lead = self._text[: len(self._text) - len(stripped)]
            self._text = stripped
        else:
            word = _WORD.match(LEAD.sub("", stripped, count=1))
            if word is None or self._may_name(word[0]):
                begun = self._match_call()
                if begun != "no":
                    return begun == "yes"
        self._state = "text"
        return True

    def _may_name(self, word: str) -> bool:
        return any(name.startswith(word) or word.startswith(name) for name in self._functions)

    def _reads_python(self, raw: str) -> bool:
        """Whether a name with a bracket is a call: prose may begin with one."""
        return self._bare_python or self._state != "start" or "[" in raw or "```" in raw

    def _match_call(self) -> Literal["yes", "no", "more"]:
        """Begin the call that the text begins with."""
        found = BEGINS.match(self._text, partial=True)
        if found is None or (found.partial and len(self._text) > _MAX_OPENING):
            return "no"
        if found.partial:
            return "more"
        raw, written = found[0], found["name"]
        name = None if written is None else resolve_name(written, self._functions)
        if found["json"] is not None:
            # The object reads its own bracket.
            self._lead += raw[:-1]
            self._text = self._text[len(raw) - 1 :]
            self._call = JsonCall(self._functions)
        elif name is None or (found["python"] is not None and not self._reads_python(raw)):
            return "no"
        else:
            self._text = self._text[len(raw) :]
            form = next(form for kind, form in FORMS.items() if found[kind] is not None)
            self._call = form(self._functions, name, raw)
        self._state = "call"
        return "yes"

    def _read_text(self, parsed: Parsed) -> bool:
        """Content up to the next tag."""
        places = [(at, tag) for tag in self._text_tags if (at := self._text.find(tag)) >= 0]
        if not places:
            held = max((partial_end(self._text, tag) for tag in self._text_tags), default=0)
            cut = len(self._text) - held
            parsed.add(self._text[:cut])
            self._text = self._text[cut:]
            return False
        at, tag = min(places)
        parsed.add(self._text[:at])
        self._text = self._text[at:]
        self._open(tag)
        return True

    def _open(self, tag: str) -> None:
        """Consume a tag that stands where the text begins."""
        if tag in self._tags.opens:
            self._state = "open"
        if tag not in CALL_TAGS:
            self._lead += "" if tag in self._hidden else tag
            self._text = self._text[len(tag) :]

    def _begin_call(self, parsed: Parsed) -> bool:
        """Behind an opening tag: another one, or a call."""
        stripped = self._text.lstrip(SPACE)
        if (read := self._reads_address(stripped)) is not False:
            return bool(read)
        for tag in self._tags.opens:
            if tag not in CALL_TAGS and stripped.startswith(tag):
                self._lead += self._text[: len(self._text) - len(stripped)]
                self._text = stripped
                self._open(tag)
                return True
        if not stripped or any(tag.startswith(stripped) for tag in self._tags.opens):
            return False
        begun = self._match_call()
        if begun != "no":
            return begun == "yes"
        # Where the tag is part of the call's own form, at least the tag is content.
        size = max((len(tag) for tag in CALL_TAGS if self._text.startswith(tag)), default=0)
        parsed.add(self._lead + self._text[:size])
        self._text = self._text[size:]
        self._lead, self._state = "", "text"
        return True

    def _read_call(self, parsed: Parsed) -> bool:
        call = self._call
        assert call is not None
        self._text = call.feed(self._text)
        if call.is_wrapper:
            self._lead += call.raw
            self._call, self._state = None, "open"
            return True
        parsed.parts += self._writer.write(call)
        if call.is_other or (call.is_complete and call.name is None):
            parsed.add(self._lead + call.raw)
            self._call, self._lead, self._state = None, "", "text"
        elif call.is_complete:
            self._call, self._lead, self._state = None, "", "after"
        return True

    def _end_call(self, parsed: Parsed) -> bool:
        """Behind a call: another of the same list, a closing tag, or text."""
        in_list = self._state == "after"
        self._text = self._text.lstrip(SPACE + ",;]})`" if in_list else SPACE)
        if not self._text:
            return False
        tags = (*self._tags.opens, *self._tags.closes)
        tag = next((tag for tag in tags if self._text.startswith(tag)), None)
        if tag in self._tags.opens:
            self._open(tag or "")
            return True
        if tag is not None:
            self._text = self._text[len(tag) :]
            self._state = "between"
            return True
        if any(tag.startswith(self._text) for tag in tags):
            return False
        word = _WORD.match(self._text)
        if self._text[0] == "{" or (in_list and word is not None and self._may_name(word[0])):
            begun = self._match_call()
            if begun != "no":
                return begun == "yes"
        self._state = "text"
        return True

    def finish(self) -> Parsed:
        parsed, call = Parsed(), self._call
        while call is not None and (rest := call.finish()):
            parsed.parts += self._writer.write(call)
            self._call, self._lead, self._state = None, "", "after"
            parsed.extend(self.feed(rest))
            call = self._call
        if call is not None:
            if self._forced:
                call.cut()
            parsed.parts += self._writer.write(call)
        is_call = call is not None and call.name is not None and not call.is_other
        if not is_call and self._state in ("start", "text", "open", "call"):
            text = self._lead + (call.raw if call is not None else "") + self._text
            # Weak models end a call with the tag that begins one.
            is_end = self._writer.has_written and text.strip(SPACE) in self._tags.opens
            parsed.add("" if is_end else text)
        elif self._state in ("after", "between"):
            tags = (*self._tags.opens, *self._tags.closes)
            is_cut_tag = any(tag.startswith(self._text) for tag in tags)
            parsed.add("" if is_cut_tag else self._text)
        self._call, self._lead, self._text = None, "", ""
        return self._without_text(parsed)
