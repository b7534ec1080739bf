"""An EngineClient over the replicas of a cluster.

Requests go where most of their prompt is cached. A stream that loses its replica goes on with
another one, as its prompt and the tokens delivered so far:

    replica ends  -> each of its live requests is continued on another replica
                     counted: those in the step that was not finished, or all if that is not known
                     those whose next failure would be one too many are tried one at a time: the
                     end of a replica then counts against that one only, which is failed
    replica full  -> the next one; when all are, 429 with the shortest Retry-After

Imports no Ray: channels to replicas come from ``connect.py``.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import replace

import msgspec

from chunkllama.cluster.commands import Channel, CommandsToAll, unless_lost
from chunkllama.cluster.explanations import is_own, with_others
from chunkllama.cluster.messages import Beat, Dropped, Ended, FromReplica, Spent
from chunkllama.cluster.prefix_keys import prefix_keys
from chunkllama.cluster.routes import Replica, Route
from chunkllama.cluster.routing import PrefixRouting
from chunkllama.engine.replay import Stream
from chunkllama.errors import EngineDeadError
from chunkllama.logger import init_logger
from chunkllama.messages import (
    AbortRequest,
    CommandReply,
    EngineErrorInfo,
    EngineRequest,
    EngineStats,
    ExplainPrompt,
    ToEngine,
    TokenDelta,
)

logger = init_logger(__name__)

# A request that has gained so many tokens since its last failover begins to count again.
_RECOVERED_TOKENS = 64
_LIMITS = ("max_model_len", "num_chunks", "max_request_tokens")
_TRIAL_DELTAS = 2  # the prompt's end, and a decode step


class ClusterEngineClient(CommandsToAll):
    """An EngineClient over several replicas.

    Args:
        routing: chooses replicas.
        max_failovers: replicas that may end under one request; one more fails it.

    Attributes:
        are_isolated: whether tenants have namespaces of their own.
        on_restarting: called with True when no replica is left, and False when there is one again.
        on_death: never called: replicas are replaced.
        restarts, hangs, replays: replicas lost, those of them that hung, and requests continued.
        failovers: requests continued, by what became of their replica.
        failover_seconds: from losing a replica to the next token, summed.
        replayed_tokens: tokens of prompts and answers that were submitted again.
    """

    def __init__(self, routing: PrefixRouting, max_failovers: int = 2) -> None:
        super().__init__()
        self.routing = routing
        self._max_failovers = max_failovers
        self._replicas: dict[str, Replica] = {}
        self._numbers = 0
        self.are_isolated = False
        self._routes: dict[str, Route] = {}
        self._unplaced: dict[str, Stream] = {}
        self._suspects: deque[Stream] = deque()
        self._trial: Stream | None = None
        self.restarts = 0
        self.hangs = 0
        self.replays = 0
        self.failovers: Counter[str] = Counter()
        self.failover_seconds = 0.0
        self.replayed_tokens = 0
        self.on_restarting: Callable[[bool], None] = lambda _: None
        self.on_death: Callable[[], None] = lambda: None
        self.on_close: Callable[[], Awaitable[None]] = _nothing

    @property
    def replicas(self) -> list[str]:
        """Names of the replicas that this front end uses."""
        return list(self._replicas)

    def replica_states(self) -> dict[str, int]:
        """Number of replicas by state."""
        draining = sum(replica.is_draining for replica in self._replicas.values())
        return {"running": len(self._replicas) - draining, "draining": draining}

    def replica_stats(self) -> list[tuple[Replica, EngineStats]]:
        """Each replica with the last snapshot of its engine."""
        return [(replica, self._merger[name]) for name, replica in self._replicas.items()]

    # -- replicas -------------------------------------------------------------------------------

    def join(self, channel: Channel) -> None:
        """Let a replica get requests."""
        self._numbers += 1
        self._replicas[channel.name] = Replica(channel, self._numbers)
        self._note_limits()
        self.routing.add(channel.name)
        self._shares.add(channel.name)
        self._give_shares()
        logger.info("replica %s has joined, %d now", channel.name, len(self._replicas))
        if len(self._replicas) == 1:
            self.on_restarting(False)
        waiting, self._unplaced = list(self._unplaced.values()), {}
        for stream in waiting:
            if stream.state.is_live:
                self._place(stream)

    def receive(self, channel: Channel, items: list[FromReplica]) -> None:
        """Take an item of a replica's channel."""
        replica = self._replicas.get(channel.name)
        if replica is None or replica.channel is not channel:
            return
        for item in items:
            match item:
                case TokenDelta():
                    stream = self._streams.get(item.request_id)
                    if stream is not None and self._has(channel.name, item.request_id):
                        self._deliver(stream, item)
                case Beat():
                    self._take_beat(replica, item)
                case Spent() | Dropped():
                    self._receive_news(item)
                case Ended():
                    self.lose(channel, item.reason, set(item.running))
                    return

    def lose(
        self, channel: Channel, reason: str, running: set[str] | None, *, hung: bool = False
    ) -> None:
        """A replica has ended: continue its requests on others.

        Args:
            running: ids of the requests in the step that was not finished; None: not known.
        """
        replica = self._replicas.get(channel.name)
        if replica is None or replica.channel is not channel:
            return
        del self._replicas[channel.name]
        channel.lost.set()
        live = []
        for request_id, stream in self._streams.items():
            if self._has(channel.name, request_id):
                self._routes[request_id].choice = None  # also if its caller has yet to read its end
                if stream.state.is_live:
                    live.append(stream)
        self.routing.remove(channel.name)
        self._shares.remove(channel.name)
        self._give_shares()
        self._merger.remove(channel.name)
        self._note_limits()
        if not replica.is_draining or live:
            self.restarts += 1
            self.hangs += hung
            logger.error(
                "replica %s is lost: %s; %d of its requests continue",
                *(channel.name, reason, len(live)),
            )
        if not self._replicas:
            self.on_restarting(True)
        now = time.monotonic()
        if replica.is_draining:  # it was to end: no request is the cause
            running = running or set()
        trial = self._trial
        if trial in live and (running is None or trial.state.request.request_id in running):
            running = {trial.state.request.request_id}  # the only one that may be the cause
        why = "hang" if hung else "drain" if replica.is_draining else "death"
        for stream in live:
            self._fail_over(stream, now, running, why)
        self._continue([stream for stream in live if stream.state.is_live])

    def _note_limits(self) -> None:
        """Take what the newest replica says of its model, and limits that hold for each one."""
        infos = [r.channel.info for r in self._replicas.values() if not r.is_draining]
        if infos:
            limits = {name: min(getattr(info, name) for info in infos) for name in _LIMITS}
            self._info = msgspec.structs.replace(infos[-1], **limits)

    def _has(self, replica: str, request_id: str) -> bool:
        choice = self._routes[request_id].choice
        return choice is not None and choice.replica == replica

    def _take_beat(self, replica: Replica, beat: Beat) -> None:
        name = replica.channel.name
        if beat.is_draining and not replica.is_draining:
            replica.is_draining = True
            self.routing.drain(name)
            self._shares.drain(name)
            self._note_limits()
            logger.info("replica %s drains", name)
        if beat.stats is not None:
            stats = beat.stats
            self._merger.update(name, stats)
            requests = stats.requests_running + stats.requests_waiting
            self.routing.report(name, requests, stats.chunks_free + stats.chunks_cached)
            if self._shares.report(name, stats.tenants):
                self._give_shares()
                self._tell_spent(replica.channel)
            total = self._merger.total()
            total.is_pushed = True
            self.on_stats(total)
        if beat.heads is not None:
            self.routing.apply_digest(name, beat.heads)

    # -- requests -------------------------------------------------------------------------------

    def _send(self, message: ToEngine) -> None:
        """Send what no reply is expected to: an abort to the replica that has the request, anything
        else to all."""
        if isinstance(message, AbortRequest):
            route = self._routes.get(message.request_id)
            if route is not None and route.choice is not None:
                self._replicas[route.choice.replica].channel.send([message])
            return
        for replica in self._replicas.values():
            replica.channel.send([message])

    def _submit(self, stream: Stream) -> None:
        request = stream.state.request
        keys = prefix_keys(request.namespace, request.prompt_token_ids, self.info.chunk_size)
        self._routes[request.request_id] = Route(keys)
        self._place(stream)

    def _place(self, stream: Stream) -> None:
        """Send a request to the best replica that has not refused it."""
        request = stream.state.request
        route = self._routes[request.request_id]
        num_chunks = -(-len(request.prompt_token_ids) // self.info.chunk_size)
        refused = route.refusals.keys()
        choice = self.routing.choose(route.keys, num_chunks=num_chunks, avoid=refused)
        if choice is None:
            self._unplaced[request.request_id] = stream
            return
        if route.failures:
            choice = replace(choice, why="retry")
        if request.explain:
            route.num_elsewhere = self._num_elsewhere(route.keys, choice.replica, request)
        self.routing.record(choice)
        route.choice = choice
        pin_chunks = num_chunks if request.pin_seconds > 0 else 0
        if self._shares.is_short(choice.replica, request.tenant, pin_chunks):
            self._give_shares(request.tenant)
        # one that was refused was not accepted, which a replay must have been
        messages: list[ToEngine] = [request] if refused else stream.state.submission()
        self._replicas[choice.replica].channel.send(messages)

    def _deliver(self, stream: Stream, delta: TokenDelta) -> None:
        if delta.error is not None and delta.error.kind == "overloaded":
            refusal = self._try_another(stream, delta)
            if refusal is None:
                return
            delta = refusal
        route = self._routes[stream.state.request.request_id]
        if delta.explanation is not None:
            delta.explanation = with_others(delta.explanation, route.num_elsewhere)
        stream.state.record(delta)
        super()._deliver(stream, delta)
        if route.lost_at is not None:
            self.failover_seconds += time.monotonic() - route.lost_at
            route.lost_at = None
        if stream is self._trial:
            route.trial_deltas += 1
            if route.trial_deltas >= _TRIAL_DELTAS or not stream.state.is_live:
                self._end_trial()

    def _try_another(self, stream: Stream, delta: TokenDelta) -> TokenDelta | None:
        """Send a refused request to another replica; returns its refusal if all are full."""
        route = self._routes[stream.state.request.request_id]
        assert route.choice is not None and delta.error is not None
        self.routing.finished(route.choice)
        route.refusals[route.choice.replica] = delta
        route.choice = None
        if any(name not in route.refusals for name in self.routing.replicas):
            self._place(stream)
            return None
        return min(route.refusals.values(), key=_retry_after)

    def _forget(self, stream: Stream) -> None:
        super()._forget(stream)
        request_id = stream.state.request.request_id
        route = self._routes.pop(request_id)
        if route.choice is not None:
            self.routing.finished(route.choice)
        self._unplaced.pop(request_id, None)
        if stream in self._suspects:
            self._suspects.remove(stream)
        if stream is self._trial:
            self._end_trial()

    # -- failover -------------------------------------------------------------------------------

    def _fail_over(self, stream: Stream, now: float, running: set[str] | None, why: str) -> None:
        """Count the end of its replica against a request, and fail one that was in too many."""
        request = stream.state.request
        route = self._routes[request.request_id]
        route.refusals.clear()
        route.lost_at = route.lost_at or now
        stream.state.submitted = False
        tokens = sum(map(len, stream.state.delivered))
        if running is None or request.request_id in running:
            recovered = tokens - route.gained >= _RECOVERED_TOKENS
            route.failures = 1 if recovered else route.failures + 1
            route.gained = tokens
        if stream is self._trial:
            self._trial = None
        if route.failures > self._max_failovers:
            self._fail_poison(stream)
            return
        self.replays += 1
        self.failovers[why] += 1
        self.replayed_tokens += len(request.prompt_token_ids) + tokens

    def _fail_poison(self, stream: Stream) -> None:
        request_id = stream.state.request.request_id
        logger.error("replicas end under request %s: failed", request_id)
        error = EngineErrorInfo(
            kind="failed",
            message="replicas ended repeatedly while they computed this request",
            code="engine_poison_request",
        )
        self._deliver(stream, TokenDelta(request_id=request_id, choices=[], error=error))

    def _continue(self, streams: list[Stream]) -> None:
        """Submit requests again; those on their last attempt one after the other."""
        for stream in streams:
            route = self._routes[stream.state.request.request_id]
            if route.failures and route.failures == self._max_failovers:
                self._suspects.append(stream)
            else:
                self._place(stream)
        self._next_trial()

    def _next_trial(self) -> None:
        if self._trial is None and self._suspects:
            self._trial = self._suspects.popleft()
            self._routes[self._trial.state.request.request_id].trial_deltas = 0
            self._place(self._trial)

    def _end_trial(self) -> None:
        """The request that was tried goes on, or has ended."""
        self._trial = None
        self._next_trial()

    # -- what concerns all replicas -------------------------------------------------------------

    def _channels(self) -> dict[int, Channel]:
        return {replica.number: replica.channel for replica in self._replicas.values()}

    async def _explain(self, command: ExplainPrompt) -> CommandReply:
        keys = prefix_keys(command.namespace, command.prompt_token_ids, self.info.chunk_size)
        choice = self.routing.choose(keys)
        if choice is None:
            raise EngineDeadError("no replica is ready")
        elsewhere = self._num_elsewhere(keys, choice.replica, command)
        channel = self._replicas[choice.replica].channel
        reply = await unless_lost(channel, channel.ask(command))
        if reply.explanation is not None:
            reply.explanation = with_others(reply.explanation, elsewhere)
        return reply

    def _num_elsewhere(
        self, keys: list[int], replica: str, asked: EngineRequest | ExplainPrompt
    ) -> int:
        """Return leading tokens of a prompt that another replica has, as its tenant may know.

        The prefixes of replicas are known by their tokens alone, without the adapter.
        """
        if asked.adapter or self.adapters:
            return 0
        if not is_own(asked.namespace, asked.tenant, are_isolated=self.are_isolated):
            return 0
        return self.routing.num_elsewhere(keys, replica) * self.info.chunk_size

    async def close(self) -> None:
        self._fail_all(EngineDeadError("the server is stopping"))
        for replica in self._replicas.values():
            replica.channel.lost.set()
        on_close, self.on_close = self.on_close, _nothing
        await on_close()


async def _nothing() -> None:
    pass


def _retry_after(delta: TokenDelta) -> int:
    return delta.error.retry_after if delta.error is not None else 0
