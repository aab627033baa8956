"""The decoding front end: takes queries, asks servers as a policy says, answers with own or decoded outputs."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from coin.errors import ConfigurationError, DeadlineError, DecodingError, LostError, OverloadedError, ServingError
from coin.serving.decodings import Decodings
from coin.serving.flight import Flight, State
from coin.serving.lateness import Lateness
from coin.serving.layout import Layout, members
from coin.serving.limits import Limits
from coin.serving.policies import Policy
from coin.serving.replies import Answer, Reply, ReplyFormat, Server
from coin.serving.server_queue import Request, ServerQueue


class _Part(NamedTuple):
    logits: Tensor
    decoded: bool
    answered_by: tuple[str, ...]


@dataclass(eq=False)
class _Query:
    flight: Flight
    inputs: Tensor
    finished: asyncio.Future[None]
    lateness: Lateness | None
    requests: dict[int, Request] = field(default_factory=dict)
    replies: dict[int, Reply] = field(default_factory=dict)


class FrontEnd:
    """Answers queries from experts and, where an expert is late or lost, from the others and the coded models.

    Every query gets one answer or one `ServingError`, by its deadline at the latest. A query with more inputs than a
    batch takes is cut into batches, which go one after the other and are never hedged: what takes long because it is
    large must not be sent to everybody. All timing is that of the running event loop: a loop with a virtual clock makes
    everything here deterministic. Use it as an async context manager, or call `start` and `stop`.

    Args:
        servers: What asks each server, in the order of the layout: experts, coded models, copies.
        layout: The servers; `Decodings.layout` or `coin.serving.layout.spread_copies`.
        policy: Decides whom to ask.
        expects: What a valid reply looks like.
        probe: One input ``[1, ...]``, that a server is tried with while it is believed to be down.
        decodings: The decoders; needed where the layout has coded models.
        limits: What bounds the waiting.
        names: The servers' names.

    Raises:
        ConfigurationError: The parts do not fit together.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        layout: Layout,
        policy: Policy,
        expects: ReplyFormat,
        probe: Tensor,
        decodings: Decodings | None = None,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        names: Sequence[str] | None = None,
    ) -> None:
        if len(servers) != layout.num_servers or (names is not None and len(names) != len(servers)):
            raise ConfigurationError(
                f"found {len(servers)} servers and {len(names or servers)} names, expected {layout.num_servers}"
            )
        if layout.num_coded and decodings is None:
            raise ConfigurationError(f"found {layout.num_coded} coded models and no decodings, expected decodings")
        self.layout = layout
        self.policy = policy
        self.limits = limits
        self.names = tuple(names) if names is not None else tuple(str(index) for index in range(len(servers)))
        self.lateness: dict[tuple[int, int], Lateness] = {}
        """By the set of wanted experts and the size class of the query, the bits of its number of inputs."""
        self.counts: Counter[str] = Counter()
        """Queries by how they ended, and ``decoded``: the answers that were."""
        self.queues = [
            ServerQueue(name, server, expects, probe, limits) for name, server in zip(self.names, servers, strict=True)
        ]
        self._decodings = decodings
        self._in_flight: set[_Query] = set()
        self._open = 0
        self._running = False

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def start(self) -> None:
        """Begin to take queries, in the running event loop."""
        for queue in self.queues:
            queue.start()
        self._running = True

    async def stop(self) -> None:
        """Take no more queries, and fail those that are under way."""
        self._running = False
        for query in list(self._in_flight):
            self._end(query, ServingError("the front end is stopping; ask again later"))
        await asyncio.gather(*(queue.stop() for queue in self.queues))

    def can_answer(self, experts: int | None = None) -> bool:
        """Whether the servers that are believed to be up suffice for a set of experts; none means all."""
        up = sum(1 << place for place, queue in enumerate(self.queues) if not queue.breaker.is_down)
        wanted = self.layout.every_expert if experts is None else experts
        return self._running and self.layout.covers(up, wanted)

    async def ask(self, inputs: Tensor, expert: int) -> Answer:
        """Return an expert's answer to inputs ``[B, ...]``.

        Raises:
            LostError: The servers that are left cannot answer.
            DeadlineError: No answer came in time.
            OverloadedError: There are too many queries already.
            ServingError: The front end is not running.
            DecodingError: The decoder failed.
            ConfigurationError: There is no such expert.
        """
        (answer,) = await self._ask(inputs, (expert,))
        return answer

    async def ask_all(self, inputs: Tensor) -> list[Answer]:
        """Return all experts' answers to inputs ``[B, ...]``; see `ask`."""
        return await self._ask(inputs, range(self.layout.num_experts))

    async def _ask(self, inputs: Tensor, experts: Sequence[int]) -> list[Answer]:
        for expert in experts:
            if not 0 <= expert < self.layout.num_experts:
                raise ConfigurationError(
                    f"found a query for expert {expert}, expected one from 0 to {self.layout.num_experts - 1}"
                )
        if not self._running:
            raise ServingError("the front end is not running; call start first")
        if self._open >= self.limits.queries:
            self.counts["overloaded"] += 1
            raise OverloadedError(f"{self._open} queries are under way, the most there may be; ask again later")
        loop = asyncio.get_running_loop()
        began = loop.time()
        pieces = torch.split(inputs, self.limits.batch)
        self._open += 1
        try:
            found = [
                await self._piece(piece, experts, began + self.limits.deadline, hedged=len(pieces) == 1)
                for piece in pieces
            ]
        except (ServingError, DecodingError, asyncio.CancelledError) as error:
            self.counts[_ENDS.get(type(error), "stopped")] += 1
            raise
        finally:
            self._open -= 1
        seconds = loop.time() - began
        answers = [
            _joined(expert, parts, seconds) for expert, parts in zip(experts, zip(*found, strict=True), strict=True)
        ]
        self.counts["answered"] += 1
        self.counts["decoded"] += sum(answer.decoded for answer in answers)
        return answers

    async def _piece(self, inputs: Tensor, experts: Sequence[int], deadline: float, hedged: bool) -> list[_Part]:
        """Ask for no more inputs than a batch takes, and return each expert's part of the answer."""
        loop = asyncio.get_running_loop()
        wanted = sum(1 << expert for expert in experts)
        down = doubted = 0
        for place, queue in enumerate(self.queues):
            if queue.breaker.is_down:
                down |= 1 << place
            elif queue.breaker.is_doubted:
                doubted |= 1 << place
        lateness = self._lateness(wanted, len(inputs)) if hedged and self.policy.hedges else None
        patience = lateness.seconds if lateness and not doubted & self.layout.hosts(wanted) else 0.0
        flight = Flight(self.layout, self.policy, wanted, patient=patience > 0 or not hedged)
        query = _Query(flight, inputs, loop.create_future(), lateness)
        self._in_flight.add(query)
        timers = [loop.call_at(deadline, self._expire, query)]
        if patience > 0:
            timers.append(loop.call_later(patience, self._become_late, query))
        try:
            self._proceed(query, flight.start([len(queue) for queue in self.queues], down))
            await query.finished
        finally:
            for timer in timers:
                timer.cancel()
            self._in_flight.discard(query)
            for request in query.requests.values():
                request.cancelled = True
        return self._parts(query, experts)

    def _lateness(self, wanted: int, samples: int) -> Lateness:
        key = wanted, samples.bit_length()
        if key not in self.lateness:
            limits = self.limits
            self.lateness[key] = Lateness(self.policy.quantile, limits.initial_lateness, longest=limits.deadline)
        return self.lateness[key]

    def _proceed(self, query: _Query, servers: int) -> None:
        """Ask servers, and end the query if it is answered or has failed."""
        flight = query.flight
        while servers and flight.state is State.pending:
            server = (servers & -servers).bit_length() - 1
            servers &= servers - 1
            request = Request(query.inputs, self._delivery(query, server))
            query.requests[server] = request
            if not self.queues[server].put(request):
                request.cancelled = True
                servers |= flight.lose(server)
        if flight.state is State.answered:
            self._end(query, None)
        elif flight.state is State.failed:
            lost = ", ".join(self.names[server] for server in members(flight.lost))
            self._end(query, LostError(f"lost {lost}, more than the others make up for; ask again later"))

    def _delivery(self, query: _Query, server: int) -> Callable[[Reply | None], None]:
        def deliver(reply: Reply | None) -> None:
            flight = query.flight
            if query.finished.done():
                return
            if reply is None:
                more = flight.lose(server)
            else:
                query.replies[server] = reply
                more = flight.arrive(server)
            self._proceed(query, more)

        return deliver

    def _become_late(self, query: _Query) -> None:
        if query.finished.done():
            return
        if query.lateness and self.layout.hosts(query.flight.missing) & query.flight.expected:
            query.lateness.observe(True)
        self._proceed(query, query.flight.become_late())

    def _expire(self, query: _Query) -> None:
        waited = ", ".join(self.names[server] for server in members(query.flight.expected))
        self._end(
            query,
            DeadlineError(f"no answer in {self.limits.deadline:g} s, still waiting for {waited}; ask again later"),
        )

    def _end(self, query: _Query, error: ServingError | None) -> None:
        if query.finished.done():
            return
        if error is not None:
            query.finished.set_exception(error)
            return
        if query.lateness and not query.flight.late and not query.flight.decoded:
            query.lateness.observe(False)
        query.finished.set_result(None)

    def _parts(self, query: _Query, experts: Sequence[int]) -> list[_Part]:
        decoded: dict[int, Tensor] = {}
        used: tuple[int, ...] = ()
        if query.flight.decoded:
            assert self._decodings is not None
            decoded, used = self._decodings.decode(query.replies)
        parts = []
        for expert in experts:
            if query.flight.decoded >> expert & 1:
                parts.append(_Part(decoded[expert], True, tuple(self.names[server] for server in used)))
            else:
                own = next(server for server in members(self.layout.hosts(1 << expert)) if server in query.replies)
                parts.append(_Part(query.replies[own].logits, False, (self.names[own],)))
        return parts


_ENDS: dict[type[BaseException], str] = {
    LostError: "lost", DeadlineError: "expired", DecodingError: "undecodable", asyncio.CancelledError: "cancelled",
}  # fmt: skip


def _joined(expert: int, parts: Sequence[_Part], seconds: float) -> Answer:
    names = tuple(dict.fromkeys(name for part in parts for name in part.answered_by))
    logits = torch.cat([part.logits for part in parts])
    return Answer(expert, logits, any(part.decoded for part in parts), names, seconds)
