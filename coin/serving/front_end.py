"""The decoding front end: takes queries, asks servers as a policy says, answers with own or decoded outputs."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from torch import Tensor

from coin.errors import ConfigurationError, DeadlineError, LostError, OverloadedError, ServingError
from coin.serving.breaker import Breaker
from coin.serving.decodings import Decodings
from coin.serving.flight import Flight, State
from coin.serving.lateness import Lateness
from coin.serving.layout import Layout, members
from coin.serving.limits import Limits
from coin.serving.policies import Policy
from coin.serving.replies import Answer, Reply, ReplyFormat, Server
from coin.serving.server_queue import Request, ServerQueue


@dataclass(eq=False)
class _Query:
    flight: Flight
    inputs: Tensor
    finished: asyncio.Future[None]
    requests: dict[int, Request] = field(default_factory=dict)
    replies: dict[int, Reply] = field(default_factory=dict)


class FrontEnd:
    """Answers queries from experts and, where an expert is late or lost, from the others and the coded models.

    Every query gets one answer or one `ServingError`, by its deadline at the latest. All timing is that of the running
    event loop: a loop with a virtual clock makes everything here deterministic. Use it as an async context manager, or
    call `start` and `stop`.

    Args:
        servers: What asks each server, in the order of the layout: experts, coded models, copies.
        layout: The servers; `Decodings.layout` or `coin.serving.layout.spread_copies`.
        policy: Decides whom to ask.
        expects: What a valid reply looks like.
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
        self.lateness = Lateness(policy.quantile, limits.initial_lateness, longest=limits.deadline)
        self.counts: Counter[str] = Counter()
        """Queries by how they ended, and ``decoded``: the answers that were."""
        self.queues = [
            ServerQueue(
                name,
                server,
                expects,
                Breaker(limits.failures, limits.cooldown),
                limit=limits.queue,
                max_batch=limits.batch,
                timeout=limits.timeout,
            )
            for name, server in zip(self.names, servers, strict=True)
        ]
        self._decodings = decodings
        self._in_flight: set[_Query] = set()
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
        if len(self._in_flight) >= self.limits.queries:
            self.counts["overloaded"] += 1
            raise OverloadedError(
                f"{len(self._in_flight)} queries are under way, the most there may be; ask again later"
            )
        loop = asyncio.get_running_loop()
        began = loop.time()
        wanted = sum(1 << expert for expert in experts)
        down = doubted = 0
        for place, queue in enumerate(self.queues):
            if queue.breaker.refuses(began):
                down |= 1 << place
            elif queue.breaker.is_doubted:
                doubted |= 1 << place
        patience = self.lateness.seconds if not doubted & self.layout.hosts(wanted) else 0.0
        flight = Flight(self.layout, self.policy, wanted, patient=patience > 0)
        query = _Query(flight, inputs, loop.create_future())
        self._in_flight.add(query)
        timers = [loop.call_later(self.limits.deadline, self._expire, query)]
        if self.policy.coded and patience > 0:
            timers.append(loop.call_later(patience, self._become_late, query))
        try:
            loads = [len(queue) for queue in self.queues]
            self._proceed(query, flight.start(loads, down))
            await query.finished
        except asyncio.CancelledError:
            self.counts["cancelled"] += 1
            raise
        finally:
            for timer in timers:
                timer.cancel()
            self._in_flight.discard(query)
            for request in query.requests.values():
                request.cancelled = True
        return self._answers(query, experts, began)

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
        if self.layout.hosts(query.flight.missing) & query.flight.expected:
            self.lateness.observe(True)
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
        if error is None:
            self.counts["answered"] += 1
            if not query.flight.late and not query.flight.decoded:
                self.lateness.observe(False)
            query.finished.set_result(None)
        else:
            self.counts[{LostError: "lost", DeadlineError: "expired"}.get(type(error), "stopped")] += 1
            query.finished.set_exception(error)

    def _answers(self, query: _Query, experts: Sequence[int], began: float) -> list[Answer]:
        decoded: dict[int, Tensor] = {}
        used: tuple[int, ...] = ()
        if query.flight.decoded:
            assert self._decodings is not None
            decoded, used = self._decodings.decode(query.replies)
            self.counts["decoded"] += query.flight.decoded.bit_count()
        seconds = asyncio.get_running_loop().time() - began
        answers = []
        for expert in experts:
            if query.flight.decoded >> expert & 1:
                logits, sources = decoded[expert], used
            else:
                own = next(server for server in members(self.layout.hosts(1 << expert)) if server in query.replies)
                logits, sources = query.replies[own].logits, (own,)
            by = tuple(self.names[server] for server in sources)
            answers.append(Answer(expert, logits, query.flight.decoded >> expert & 1 == 1, by, seconds))
        return answers
