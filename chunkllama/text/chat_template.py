"""A conversation as token ids: the model's jinja2 template, in a sandbox, with users' text kept
plain text.

Special-token strings inside user text are replaced by sentinels, the template renders, the result
is cut at the control tokens the template wrote, the strings go back, and each stretch is encoded
whole with control tokens off. Without such strings the ids are those of transformers'
``apply_chat_template(tokenize=True)``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from tokenizers import AddedToken

from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.text.literals import ControlText, Literals
from chunkllama.text.printed_text import check_all_text
from chunkllama.text.sandbox import TemplateEnvironment, num_chars
from chunkllama.text.template_budget import TemplateLimitError
from chunkllama.text.template_capabilities import TemplateCapabilities, probe
from chunkllama.text.tokenizer import Tokenizer, encode_continuation, encode_ids
from chunkllama.text.tokenizer_files import read_json

RENDER_SECONDS = 1.0
# Of a template that a request brings: those of published models take milliseconds.
REQUEST_RENDER_SECONDS = 0.25
_PROBE_SECONDS = 2.0  # of all probe conversations together, of the thread's own time
_WORK_CHARS = 1 << 26
_OUTPUT_CHARS = 1 << 16
MAX_TEMPLATE = 1 << 20  # characters; published ones have up to 20,000, and compiling takes time
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_PROBE = [{"role": "user", "content": "Hello"}]


class ChatTemplate:
    """One model's chat format.

    Args:
        source: the jinja2 template, or several by name ("default", "tool_use").
        tokenizer: of the same model.
        render_seconds: of its thread's own time that one rendering may take.
    """

    def __init__(
        self,
        source: str | dict[str, str],
        tokenizer: Tokenizer,
        render_seconds: float = RENDER_SECONDS,
    ) -> None:
        self._render_seconds = render_seconds
        self._capabilities: TemplateCapabilities | None = None
        sources = {"default": source} if isinstance(source, str) else source
        self._tokenizer = tokenizer
        self._environment = TemplateEnvironment()
        self._sources = sources
        self._templates = {
            name: self._environment.from_string(text) for name, text in sources.items()
        }
        written = "".join(sources.values())
        self._controls = {
            token.content: token
            for token in tokenizer.added_tokens.values()
            if token.special or (token.content in written and not token.content.isspace())
        }
        self._control_text = ControlText(self._controls)
        self._plain = tokenizer.without_control_tokens(self._controls)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the template's sources."""
        return hashlib.sha256(json.dumps(self._sources, sort_keys=True).encode()).hexdigest()

    def encode(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Prompt ids of a conversation: what ``write`` returns, called.

        Args and raises as ``write``.
        """
        return self.write(messages, **options)()

    def write(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        require_all_text: bool = False,
    ) -> Callable[[], list[int]]:
        """Render a conversation; what is returned tokenizes it, and may run in another thread.

        Args:
            require_all_text: refuse a conversation of which the template leaves out a text.

        Raises:
            InvalidRequestError: the template refuses the conversation or ran out of its limits.
        """
        literals = Literals(self._control_text, (messages, tools, template_kwargs))
        chat, tools, template_kwargs = literals.hide((messages, tools, template_kwargs))
        flags = (add_generation_prompt, continue_final_message, require_all_text)
        text = self._render(chat, tools, template_kwargs, *flags)
        if not literals.hidden:
            return lambda: self._tokenizer.encode(text, allow_special=True)
        return lambda: self._encode_stretches(text, literals.restore)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        require_all_text: bool = False,
    ) -> str:
        """The prompt as text, for people to read; its ids come from `encode` alone.

        Raises:
            InvalidRequestError: as `encode`.
        """
        flags = (add_generation_prompt, continue_final_message, require_all_text)
        return self._render(messages, tools, template_kwargs, *flags)

    def check(self) -> None:
        """Render one greeting.

        Raises:
            ConfigError: the template is hostile or broken beyond refusing a conversation.
        """
        try:
            self._render(_PROBE, None, None, True, False)
        except InvalidRequestError as error:
            if error.code != "chat_template_refused":
                raise ConfigError(f"the model's chat template cannot be used: {error}") from error

    @property
    def capabilities(self) -> TemplateCapabilities:
        """What the template can express, read from the output of probe conversations."""
        # No cached_property, which before Python 3.12 locks all templates meanwhile.
        if self._capabilities is None:
            self._capabilities = self._probe()
        return self._capabilities

    def _probe(self) -> TemplateCapabilities:
        is_stopped = False  # by its limits; each further probe could take as long
        began = time.thread_time()

        def render(
            messages: list[dict[str, Any]],
            tools: list[dict[str, Any]] | None,
            arguments: dict[str, Any] | None = None,
        ) -> str | None:
            nonlocal is_stopped
            if is_stopped:
                return None
            try:
                return self._fill(messages, tools, arguments, True)
            except InvalidRequestError as error:
                is_stopped = error.code == "chat_template_stopped"
                return None
            finally:
                is_stopped = is_stopped or time.thread_time() - began > _PROBE_SECONDS

        added = {token.content for token in self._tokenizer.added_tokens.values()}
        return probe(render, added)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not define itself."""
        return self._environment.variables_of(self._sources.values())

    def _render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        template_kwargs: dict[str, Any] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        require_all_text: bool = False,
    ) -> str:
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt=false", "continue_final_message"
            )
        if not messages:
            raise InvalidRequestError("messages must not be empty", "messages")
        chat = [_aliased({k: v for k, v in m.items() if v is not None}) for m in messages]
        last = chat[-1]
        final = _mark_final(chat) if continue_final_message else ""
        text = self._fill(chat, tools, template_kwargs, add_generation_prompt)
        if continue_final_message and not _holds_final(text, final):
            # Some templates drop all before the end of a thought, here what is to be continued.
            chat[-1] = last
            _mark_final(chat, stands_for_text=True)
            text = self._fill(chat, tools, template_kwargs, add_generation_prompt)
            before, tag, after = text.rpartition(_CONTINUE.strip())
            text = f"{before}{final if tag else ''}{tag}{after}"
        if require_all_text:
            check_all_text(chat, text)
        return _cut_final(text) if continue_final_message else text

    def _fill(
        self,
        chat: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        template_kwargs: dict[str, Any] | None,
        add_generation_prompt: bool,
    ) -> str:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        variables = {
            **self._tokenizer.special_tokens,
            **(template_kwargs or {}),
            "messages": chat,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._run(self._templates[name], variables)

    def _run(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        size = num_chars(variables)
        try:
            with self._environment.budget(
                self._render_seconds, work=_WORK_CHARS + 64 * size, output=_OUTPUT_CHARS + 4 * size
            ):
                return template.render(variables)
        except (TemplateLimitError, SecurityError) as error:
            raise InvalidRequestError(
                f"the chat template was stopped: {error}", "messages", "chat_template_stopped"
            ) from error
        except jinja2.UndefinedError as error:
            raise InvalidRequestError(
                f"the chat template needs what the conversation lacks: {error}",
                "messages",
                "chat_template_refused",
            ) from error
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                f"the chat template refused the conversation: {error}",
                "messages",
                "chat_template_refused",
            ) from error
        except Exception as error:  # a template's own bug can raise anything
            raise InvalidRequestError(
                f"the chat template failed: {type(error).__name__}: {error}",
                "messages",
                "chat_template_failed",
            ) from error

    def _encode_stretches(self, text: str, restore: Callable[[str], str]) -> list[int]:
        ids: list[int] = []
        start = 0
        before: AddedToken | None = None
        for match in [*self._control_text.pattern.finditer(text), None]:
            after = self._controls[match[0]] if match else None
            stretch = text[start : match.start() if match else len(text)]
            # A control token may swallow the white space beside it.
            stretch = stretch.lstrip() if before is not None and before.rstrip else stretch
            stretch = restore(stretch.rstrip() if after is not None and after.lstrip else stretch)
            if stretch and before is None:
                ids += encode_ids(self._plain, stretch, add_special_tokens=False)
            elif stretch:
                ids += encode_continuation(self._plain, stretch)
            if match is not None and after is not None:
                control_id = self._tokenizer.token_id(after.content)
                assert control_id is not None
                ids.append(control_id)
                start, before = match.end(), after
        return ids


def load_chat_template(
    path: Path, tokenizer: Tokenizer, override: str | Path | None = None
) -> ChatTemplate | None:
    """The template of a model folder (chat_template.jinja, else tokenizer_config.json, else
    chat_template.json), None where it has none.

    Args:
        override: a file that holds a template to use instead.

    Raises:
        ConfigError: it cannot be read or compiled, or misbehaves on a greeting.
    """
    origin, source = _read_template(path, override)
    if not source:
        return None
    texts = source.values() if isinstance(source, dict) else [source]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{origin}: chat_template must be text, or a list of named templates")
    if (size := sum(map(len, texts))) > MAX_TEMPLATE:
        raise ConfigError(f"{origin}: chat_template has {size:,} characters of {MAX_TEMPLATE:,}")
    if isinstance(source, dict) and "default" not in source:
        raise ConfigError(f"{origin}: chat_template has no entry named default")
    try:
        template = ChatTemplate(source, tokenizer)
    except Exception as error:  # also what Python's compiler says about the code made of it
        raise ConfigError(f"{origin}: the chat template does not compile: {error}") from error
    try:
        template.check()
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    return template


def _shortened(override: str | Path) -> str:
    """A path whole, and the beginning of what is rather a template."""
    text = str(override)
    return text if "\n" not in text and "{" not in text else f"{text.splitlines()[0]:.60}"


def _read_template(path: Path, override: str | Path | None) -> tuple[Path, Any]:
    """The file that the template comes from, and its text or named texts; None: it has none."""
    origin = path / "chat_template.jinja"
    if override is not None:
        origin = Path(override)
        try:
            is_file = origin.is_file()
        except OSError:  # a template is too long for a path
            is_file = False
        if not is_file:
            raise ConfigError(
                f"chat_template: no file {_shortened(override)}; write the template to a file and "
                "give its path"
            )
    if origin.is_file():
        try:
            return origin, origin.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{origin}: the chat template cannot be read: {error}") from error
    origin = path / "tokenizer_config.json"
    source: Any = read_json(origin).get("chat_template")
    if not source and (path / "chat_template.json").is_file():  # of multimodal models
        origin = path / "chat_template.json"
        source = read_json(origin).get("chat_template")
    if isinstance(source, list):
        named = [(e.get("name"), e.get("template")) for e in source if isinstance(e, dict)]
        source = dict(named) if all(isinstance(name, str) for name, _ in named) else [None]
    return origin, source


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under every name templates read it by."""
    found = next((message[k] for k in _REASONING_KEYS if message.get(k) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


def _mark_final(chat: list[dict[str, Any]], *, stands_for_text: bool = False) -> str:
    """Append the tag before which the rendered prompt is cut to the last message, or put it in the
    place of its text; returns that message's text."""
    content = chat[-1].get("content")
    if isinstance(content, list):
        for index in range(len(content) - 1, -1, -1):
            if "text" in content[index]:
                text = str(content[index]["text"])
                content = [*content]
                marked = _CONTINUE if stands_for_text else text + _CONTINUE
                content[index] = {**content[index], "text": marked}
                chat[-1] = {**chat[-1], "content": content}
                return text
    elif isinstance(content, str):
        marked = _CONTINUE if stands_for_text else content + _CONTINUE
        chat[-1] = {**chat[-1], "content": marked}
        return content
    raise InvalidRequestError(
        "continue_final_message needs text in the last message", "continue_final_message"
    )


def _holds_final(text: str, final: str) -> bool:
    """Tell whether all of the last message stands before the tag; white space may differ."""
    before, tag, _ = text.rpartition(_CONTINUE.strip())
    return bool(tag) and "".join(before.split()).endswith("".join(final.split()))


def _cut_final(text: str) -> str:
    tag = text.rfind(_CONTINUE.strip())
    if tag < 0:
        raise InvalidRequestError(
            "the chat template drops the last message's text, so it cannot be continued",
            "continue_final_message",
        )
    return text[:tag] if text.startswith(_CONTINUE, tag) else text[:tag].rstrip()
