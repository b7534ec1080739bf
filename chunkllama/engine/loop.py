"""The loop of an engine process: receive messages, run a step, send what it gave."""

from __future__ import annotations

from typing import Protocol

from chunkllama.adapter_messages import LoadAdapter, UnloadAdapter
from chunkllama.cache_messages import (
    CacheCommand,
    DigestRequest,
    KeepSnapshot,
    LoadPack,
    WatchCache,
    WriteSnapshot,
)
from chunkllama.engine.core import EngineCore
from chunkllama.engine.explanations import PendingExplanations
from chunkllama.errors import InvalidRequestError, OverloadedError
from chunkllama.logger import init_logger
from chunkllama.messages import (
    AbortRequest,
    EngineErrorInfo,
    EngineRequest,
    ExplainPrompt,
    FromEngine,
    SetTenants,
    Shutdown,
    StatsRequest,
    ToEngine,
    TokenDelta,
)
from chunkllama.tenant_limits import TenantTable
from chunkllama.tuning_messages import StartTuning, StopTuning

logger = init_logger(__name__)

QUIET_SECONDS = 0.2  # without a message, before work that no request is to wait for


class EngineChannel(Protocol):
    """How messages reach the loop and leave it: a socket or an in-memory queue."""

    def receive(self, seconds: float | None) -> list[ToEngine]:
        """Messages that have arrived. A closed peer is a Shutdown.

        Args:
            seconds: to wait for the first one; None: without end.
        """
        ...

    def send(self, messages: list[FromEngine]) -> None: ...


def run_engine_loop(core: EngineCore, channel: EngineChannel) -> None:
    """Serve the channel until a Shutdown arrives; the step in flight is finished first."""
    channel.send([core.info])
    questions = PendingExplanations()
    while True:
        if core.journal is not None:
            core.journal.turn()
        busy = core.has_work()
        if not busy:
            core.check_idle()
        is_idle = not (busy or questions or core.is_moving_chunks() or core.is_tuning())
        limit = None if core.idle_work is None else QUIET_SECONDS
        messages = channel.receive(limit if is_idle else 0.0)
        if is_idle and not messages and core.idle_work is not None:
            work, core.idle_work = core.idle_work, None
            work()
        replies: list[FromEngine] = []
        for message in messages:
            if isinstance(message, Shutdown):
                return
            replies.extend(_handle(core, message, questions))
        replies.extend(core.explain(question) for question in questions.take())
        if core.has_work():
            replies.extend(core.step())
            if (snapshot := core.stats_to_push()) is not None:
                replies.append(snapshot)
        replies.extend(core.adapter_replies())
        replies.extend(core.move_chunks())
        replies.extend(core.cache_events())
        if replies:
            channel.send(replies)
        if reports := core.tune():
            channel.send([*reports])


def _add(core: EngineCore, request: EngineRequest) -> list[FromEngine]:
    """Queue a request; returns its end if it is refused."""
    try:
        core.add(request)
    except InvalidRequestError as error:
        info = EngineErrorInfo(
            kind="invalid", message=error.message, param=error.param, code=error.code
        )
    except OverloadedError as error:
        info = EngineErrorInfo(
            kind="overloaded",
            message=error.message,
            code="engine_overloaded",
            retry_after=error.retry_after,
        )
    except Exception:  # a bug; other requests are not to end with this one
        logger.exception("request %s cannot be queued", request.request_id)
        info = EngineErrorInfo(kind="failed", message="the request cannot be queued")
    else:
        return []
    return [TokenDelta(request_id=request.request_id, choices=[], error=info)]


def _change_adapters(core: EngineCore, message: LoadAdapter | UnloadAdapter) -> list[FromEngine]:
    if isinstance(message, UnloadAdapter):
        return [core.unload_adapter(message)]
    refusal = core.load_adapter(message)
    return [] if refusal is None else [refusal]


def _handle(
    core: EngineCore, message: ToEngine, questions: PendingExplanations
) -> list[FromEngine]:
    match message:
        case ExplainPrompt():
            questions.add(message)
            return []
        case EngineRequest():
            return _add(core, message)
        case AbortRequest():
            core.abort(message.request_id, message.index)
            return []
        case CacheCommand():
            return [core.cache_command(message)]
        case WatchCache():
            return core.watch_cache(message)
        case LoadAdapter() | UnloadAdapter():
            return _change_adapters(core, message)
        case StartTuning() | StopTuning():
            return core.tuning_command(message)
        case StatsRequest():
            return [
                core.stats(
                    include_tree=message.include_tree, include_tenants=message.include_tenants
                )
            ]
        case DigestRequest():
            return [*core.digest(message.max_keys)]
        case SetTenants():
            core.set_tenants(TenantTable(message.tenants, message.default))
            return []
        case LoadPack() | KeepSnapshot() | WriteSnapshot():
            return core.file_command(message)
        case _:
            raise AssertionError(f"unknown message {message!r}")
