"""The parts of the application that routes use, in one object that a dependency injects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from starlette.responses import Response

from chunkllama import __version__
from chunkllama.engine.client import EngineClient
from chunkllama.errors import EngineDeadError
from chunkllama.messages import EngineRequest
from chunkllama_server.api.batch.runner import BatchRunner
from chunkllama_server.api.common.background import BackgroundResponses
from chunkllama_server.api.common.field_limits import check_field_limits
from chunkllama_server.api.common.idle_prefill import IdlePrefill
from chunkllama_server.api.common.pack_folder import PackFolder
from chunkllama_server.api.common.responses import Responses
from chunkllama_server.api.common.shared_reads import SharedReads
from chunkllama_server.api.common.structured_outputs import GrammarChecker
from chunkllama_server.api.common.text_service import TextService
from chunkllama_server.api.common.unknown_fields import unknown_fields
from chunkllama_server.api.schema.base import RequestModel, SamplingFields
from chunkllama_server.api.tuning.runner import TuningRunner
from chunkllama_server.config.settings import Settings
from chunkllama_server.metrics.history import StatsHistory
from chunkllama_server.metrics.server_metrics import ServerMetrics
from chunkllama_server.transport.auth import Tenants
from chunkllama_server.transport.body import json_response
from chunkllama_server.transport.errors import (
    ApiError,
    invalid,
    not_found_model,
    refused_model,
    unavailable,
)
from chunkllama_server.transport.request_context import RequestInfo, request_info
from chunkllama_server.transport.sse import (
    OPENAI_STREAM,
    SseResponse,
    StreamForm,
    StreamTimes,
)

T = TypeVar("T")
# A probe must answer before the timeout of the prober; Kubernetes' default is one second.
PROBE_SECONDS = 0.8
# Names that clients of TGI send to a server of one model, which does not read them.
_ANY_MODEL = frozenset(("dummy", "tgi"))


@dataclass(slots=True)
class Lifecycle:
    """Whether new work is accepted.

    Attributes:
        draining: live requests finish, new ones get 503.
        restarting: the engine process is being restarted; requests wait.
    """

    draining: bool = False
    restarting: bool = False


@dataclass(slots=True, kw_only=True)
class ServerContext:
    """The application's parts.

    Attributes:
        tenants: API keys and cache namespaces.
        generation_defaults: the model's own sampling values, for fields a client leaves out.
        fork_tokens: with which the model begins a branch of its answer.
        reads, operator_reads: of metrics and dashboards, by tenants and by operators.
        refreshes: of the engine's snapshot, for tenants.
        history: the engine's last minutes, for the dashboard.
        batches: files and batch jobs; None where they are turned off.
        tunings: fine-tuning jobs; None where they are turned off.
        created: Unix time at which the application was built, for /v1/models.
        packs: files of prefixes that can be loaded.
        replicas: figures of each replica of a cluster; None where there is one engine.
        failovers: requests continued on another replica, by what became of theirs.
        idle: prefills while no request runs; None where that is off.
        fingerprint: version and backend; changes whenever outputs may change.
    """

    engine: EngineClient
    text: TextService
    settings: Settings
    metrics: ServerMetrics
    grammars: GrammarChecker
    responses: Responses
    background: BackgroundResponses
    tenants: Tenants
    packs: PackFolder
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    fork_tokens: tuple[int, int] | None = None
    idle: IdlePrefill | None = None
    batches: BatchRunner | None = None
    tunings: TuningRunner | None = None
    replicas: Callable[[], list[dict[str, Any]]] | None = None
    failovers: Mapping[str, int] = field(default_factory=dict)
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    reads: SharedReads = field(default_factory=SharedReads)
    operator_reads: SharedReads = field(default_factory=SharedReads)
    refreshes: SharedReads = field(default_factory=lambda: SharedReads(most_pause=1.0))
    _refreshing: asyncio.Task[None] | None = field(default=None, init=False)
    history: StatsHistory = field(default_factory=StatsHistory)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def fingerprint(self) -> str:
        info = self.engine.info
        storage = f"kv_{info.kv_dtype}" if info.is_kv_quantized else ""
        tier = f"tier_int{info.tier_bits}" if info.tier_bits else ""
        sums = "deterministic" if info.is_deterministic else ""
        parts = ("chunkllama", __version__, info.backend, info.isa_level, storage, tier, sums)
        return "-".join(part for part in parts if part)

    @property
    def num_chunks(self) -> int:
        """Chunks of all engines' pools together, as they last reported."""
        return self.metrics.engine.last.chunks_total or self.engine.info.num_chunks

    @property
    def max_running(self) -> int:
        """Requests that all engines can run at once."""
        running = 1
        if self.replicas is not None:
            running = sum(replica["state"] == "running" for replica in self.replicas())
        return self.settings.max_num_seqs * running

    def stream(
        self,
        events: AsyncGenerator[bytes, None],
        info: RequestInfo,
        form: StreamForm = OPENAI_STREAM,
    ) -> SseResponse:
        """Make the response that streams ``events`` to the client of this request."""
        settings = self.settings
        times = StreamTimes(
            stall=settings.stream_stall_seconds,
            first_byte=settings.stream_first_byte_seconds,
            comment=settings.stream_comment_seconds,
        )
        return SseResponse(events, times, info.started, form)

    def check_serving(self) -> None:
        """Refuse new work while starting or draining.

        Raises:
            ApiError: 503 with Retry-After.
        """
        if self.lifecycle.draining:
            raise unavailable("The server is shutting down", "draining")
        if not self.engine.is_ready:
            raise unavailable("The engine is not ready", "engine_unavailable")

    def allowed_models(self, tenant: str) -> tuple[str, ...]:
        """Return the names that a tenant may request; the first is its default.

        Without a list of its own it may request all of them, and every adapter.
        """
        return self.tenants.quotas(tenant).allowed_models or self.settings.model_names

    def visible_models(self, tenant: str) -> list[str]:
        """Return what a tenant may request now: served names, then adapters by their own."""
        names = [name for name in self.allowed_models(tenant) if self.adapter_of(name) == ""]
        return names + [name for name in self.engine.adapters if self._may_use(name, name, tenant)]

    def adapter_of(self, name: str) -> str | None:
        """Return the adapter that a model's name stands for, "" for the base model; None: the name
        is not served."""
        names, adapters = self.settings.model_names, self.engine.adapters
        if name in names or name in adapters:
            return name if name in adapters else ""
        behind = (name.removeprefix(f"{base}:") for base in names if name.startswith(f"{base}:"))
        return next((adapter for adapter in behind if adapter in adapters), None)

    def _owner(self, adapter: str) -> str | None:
        """Whose job has made an adapter, which others do not see; None: it is an operator's."""
        return None if self.tunings is None else self.tunings.owner(adapter)

    def _model_of(self, given: str | None, tenant: str) -> str:
        """Return the model that a request means: its tenant's default where it names none."""
        is_any = given in _ANY_MODEL and "tgi" in self.settings.protocols
        if given and not (is_any and self.adapter_of(given) is None):
            return given
        return self.allowed_models(tenant)[0]

    def _may_use(self, name: str, adapter: str, tenant: str) -> bool:
        if (owner := self._owner(adapter)) is not None:
            return owner == tenant
        allowed = self.tenants.quotas(tenant).allowed_models
        if allowed is None or (not adapter and name in allowed):
            return True
        spellings = [adapter, *(f"{base}:{adapter}" for base in self.settings.model_names)]
        return bool(adapter) and any(spelling in allowed for spelling in spellings)

    def check_model(self, name: str, tenant: str) -> str:
        """Return the name to answer with.

        Raises:
            ApiError: 404 for a model that is not served, 403 for one that the tenant may not use.
        """
        adapter = self.adapter_of(name)
        if adapter is None or self._owner(adapter) not in (None, tenant):
            raise not_found_model(name)
        if not self._may_use(name, adapter, tenant):
            self.metrics.reject_tenant(tenant, "model")
            raise refused_model(name)
        return name

    def highest_priority(self, tenant: str) -> int:
        """Return the lowest priority number that a tenant's requests may carry."""
        own = self.tenants.quotas(tenant).highest_priority
        return self.settings.highest_priority if own is None else own

    def charge(self, info: RequestInfo, requests: Iterable[EngineRequest]) -> None:
        """Charge a tenant the tokens that the requests of one HTTP request may use.

        That is the prompts, and the output where ``max_tokens`` limits it; the HTTP request's end
        settles the charge, or that of the response that it runs in the background.

        Raises:
            ApiError: 429 beyond the tenant's tokens per minute.
        """
        estimate = 0
        for request in requests:
            sampling = request.sampling
            output = 0 if request.wants_hidden_states else sampling.max_tokens or 0
            choices = max(sampling.num_sequences, sampling.beam_width)
            estimate += len(request.prompt_token_ids) + output * choices
        try:
            info.charge = info.rates.take_tokens(estimate)
        except ApiError:
            self.metrics.reject_tenant(info.tenant, "tokens")
            raise

    async def refresh_stats(self, view: str | None) -> None:
        """Update the engine snapshot if a new one arrives in time; callers at once share it.

        Else the last one that the step loop sent is shown, with its age. It has a part for each
        tenant, so tenants that ask again and again cause it in at most a fifth of the
        time; the pause is at most 1 s, so that a snapshot of over 0.25 s takes more.

        Args:
            view: as ``tenant_view`` returns it; operators do not wait for tenants.
        """
        if view is not None:
            await self.refreshes.get("stats", "", self._refresh)
            return
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    async def read(self, name: str, view: str | None, read: Callable[[], Awaitable[T]]) -> T:
        """Return what ``read`` returns, for all callers of ``name`` and ``view`` together.

        Args:
            view: as ``tenant_view`` returns it; operators do not wait for tenants.
        """
        reads = self.operator_reads if view is None else self.reads
        return await reads.get(name, view, read)

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                self.metrics.update(await self.engine.stats(include_tenants=True))
        except (TimeoutError, EngineDeadError):
            return

    async def prepare(self, info: RequestInfo, work: Callable[[], T]) -> T:
        """Return ``work()`` on a request's body; a worker thread does it where that is long.

        Raises:
            ApiError: 503 where too many long bodies wait.
        """
        return await self.text.prepare(info.body_bytes, work)

    async def respond(self, num_values: int, make: Callable[[], Any]) -> Response:
        """Return a JSON answer; a worker thread makes one of many values.

        Args:
            num_values: numbers or texts, about.
            make: returns what the answer is written from.
        """
        return await self.text.write(num_values, lambda: json_response(make()))

    async def admit(self, body: RequestModel, request: Request) -> RequestInfo:
        """Check what every POST needs: readiness, model, unknown and refused fields.

        Raises:
            ApiError: 400, 403, 404 or 503.
        """
        self.check_serving()
        info = request_info(request.scope)
        given = getattr(body, "model", None)
        model = self._model_of(given, info.tenant)
        if given is not None:
            body.__dict__["model"] = model
        self.check_model(model, info.tenant)
        info.adapter = self.adapter_of(model) or ""
        check_field_limits(body, self.settings)
        unknown = await self.prepare(info, lambda: [*info.unknown, *unknown_fields(body)])
        if unknown and self.settings.strict:
            raise invalid(f"Unknown field {unknown[0][:200]!r}", unknown[0], "unknown_field")
        if given and given != model:
            unknown.append("model")
        ignored = [*unknown, *info.harmless]
        if ignored:
            self.metrics.ignore_fields(len(ignored))
            info.name_ignored_fields(ignored)
        return info


async def get_context(request: Request) -> ServerContext:
    """Return what the endpoints of an application share.

    FastAPI would call a plain function in a thread, at each request.
    """
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context


Context = Annotated[ServerContext, Depends(get_context)]


def tenant_view(context: ServerContext, request: Request) -> str | None:
    """Return the tenant whose part the caller may see; None is all: an operator, the admin port,
    or a server without keys."""
    info = request_info(request.scope)
    sees_all = not context.tenants.keys or info.is_operator or info.is_admin
    return None if sees_all else info.tenant


def check_streamable(body: SamplingFields) -> None:
    """Refuse fields that ``stream`` excludes.

    ``stream_options`` without it has nothing to do: gateways add it to every request, and a whole
    answer has its usage.

    Raises:
        ApiError: 400.
    """
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("prompt_logprobs cannot be streamed", "prompt_logprobs")
    if body.stream and body.use_beam_search:
        raise invalid("Beam search cannot be streamed", "use_beam_search")
