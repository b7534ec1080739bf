"""Fields that this server does not know: named, or refused if they constrain an answer."""

from __future__ import annotations

from chunkllama_server.api.dialect.translate import binding, looks_binding
from chunkllama_server.api.schema.base import RequestModel, walk_fields
from chunkllama_server.transport.errors import invalid

# Objects that say what the answer is to be, unlike messages and tools.
_OPTIONS = frozenset(
    ("response_format", "structured_outputs", "text", "reasoning", "stream_options")
)
# Fields of one endpoint that another does not have, and whose names alone do not say it.
_BINDING = frozenset(
    (
        *("tool_choice", "functions", "function_call", "num_predict", "n_predict"),
        *("chat_template", "chat_template_kwargs"),
    )
)


def unknown_fields(body: RequestModel) -> list[str]:
    """Paths of the fields that no model knows.

    Raises:
        ApiError: 400 for one that is known and not served, or would constrain the answer.
    """
    unknown = []
    for path, kind in walk_fields(body):
        if kind == "refused":
            raise invalid(f"{path} is not supported by this server", path, "unsupported")
        unknown.append(path)
    _check_options(unknown)
    if body.refuses_binding:
        _check_unknown(body)
    return unknown


def _check_options(unknown: list[str]) -> None:
    """Refuse an unknown member of an option that would constrain the answer.

    Raises:
        ApiError: 400 naming it.
    """
    for path in unknown:
        option, _, member = path.partition(".")
        if member and option in _OPTIONS and looks_binding(path.rpartition(".")[2]):
            raise binding(path)


def _check_unknown(body: RequestModel) -> None:
    """Refuse an unknown field, also in ``options`` or ``parameters``, that would constrain the
    answer.

    Raises:
        ApiError: 400 naming it.
    """
    for holder in ("", "options", "parameters"):
        fields = getattr(body, holder, None) if holder else body
        extra = fields.model_extra if isinstance(fields, RequestModel) else None
        for name, value in (extra or {}).items():
            if value and value != "auto" and (name in _BINDING or looks_binding(name)):
                raise binding(f"{holder}.{name}".removeprefix("."))
