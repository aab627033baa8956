"""The decoding front end: takes queries, asks servers by a policy, returns own or decoded outputs."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from coin.errors import DeadlineError, DecodingError, LostError, OverloadedError, ServingError
from coin.serving.decodings import Decodings
from coin.serving.layout import Layout, members
from coin.serving.limits import Limits
from coin.serving.policies import Lateness, Policy, Query, State
from coin.serving.replies import Answer, Decoded, Reply, ReplyFormat, Server
from coin.serving.server_queue import Request, ServerQueue


class _Query(Query):
    def __init__(self, inputs: Tensor, *about: Any) -> None:
        super().__init__(*about)
        self.inputs, self.finished = inputs, asyncio.get_running_loop().create_future()
        self.requests: list[Request] = []
        self.replies: dict[int, Reply] = {}
        self.full = 0  # the servers among the lost ones that are well, but whose queue had no room


class FrontEnd:
    """Answers queries from experts and, where an expert is late or lost, from the others and the coded models.

    Every query gets one answer or one `ServingError`, by its deadline at the latest. A query larger than a batch is cut
    into batches, which are sent one after the other, each like a query of its size: a large query is not late because
    of its size, and blocks others for one batch at a time. All timing is that of the running event loop: with a virtual
    clock everything is deterministic. Use it as an async context manager.

    Args:
        servers: The coroutine function of each server by name, in the layout's order: experts, coded models, copies.
        layout: The servers, asked by the `policy`.
        expects: The format of a valid reply; `probe`: one input ``[1, ...]``, sent to a server that seems down.
        decodings: The decoders; required if the layout has coded models.
        limits: Timeouts and queue lengths.
    """

    def __init__(
        self,
        servers: Mapping[str, Server],
        layout: Layout,
        policy: Policy,
        expects: ReplyFormat,
        probe: Tensor,
        decodings: Decodings | None = None,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
    ) -> None:
        self.layout, self.policy, self.limits = layout, policy, limits
        self.lateness: dict[tuple[int, int], Lateness] = {}
        """By the set of wanted experts and the size class of the query, the bits of its number of inputs."""
        self.counts: Counter[str] = Counter()
        """Queries by how they ended, and ``decoded``: the answers that were."""
        self.queues = [ServerQueue(name, server, expects, probe, limits) for name, server in servers.items()]
        self._decodings, self._ended = decodings, asyncio.Event()
        self._pending: set[_Query] = set()
        self._open, self._running = 0, False

    async def __aenter__(self) -> Self:
        """Start taking queries, in the running event loop."""
        for queue in self.queues:
            queue.start()
        self._running = True
        return self

    async def __aexit__(self, *error: object) -> None:
        """Take no more queries, and fail the running ones."""
        self._running = False
        for query in list(self._pending):
            self._end(query, ServingError("the front end is stopping; ask again later"))
        await asyncio.gather(*(queue.stop() for queue in self.queues))

    async def drain(self) -> None:
        """Take no more queries, and wait for the running ones, which end by their deadline."""
        self._running = False
        while self._open:
            self._ended.clear()
            await self._ended.wait()

    def can_answer(self, experts: int | None = None) -> bool:
        """Whether the servers considered up suffice for a set of experts, by default all."""
        up = self._servers(lambda queue: not queue.is_down)
        return self._running and self.layout.covers(up, self.layout.every_expert if experts is None else experts)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a query as running until the end of the block.

        Raises ServingError where the front end is not running, OverloadedError where there are too many queries.
        """
        if not self._running:
            raise ServingError("the front end is not running, or stops; ask again later")
        if self._open >= self.limits.queries:
            self.counts["overloaded"] += 1
            raise OverloadedError(f"{self._open} queries are under way, the most there may be; ask again later")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self._ended.set()

    async def ask_experts(self, inputs: Tensor, experts: Sequence[int], deadline: float) -> list[Answer]:
        """Return some experts' answers to inputs ``[B, ...]`` of a query that was `admitted`, by a time of the loop.

        Raises a ServingError: LostError where the remaining servers cannot answer, DeadlineError where no answer came
        in time, OverloadedError where the queue of a required server is full. Raises DecodingError where the decoder
        fails.
        """
        began = asyncio.get_running_loop().time()
        try:
            pieces = torch.split(inputs, self.limits.batch)
            found = [await self._ask_piece(piece, experts, deadline) for piece in pieces]
        except (ServingError, DecodingError, asyncio.CancelledError) as error:
            self.counts[_ENDS.get(type(error), "stopped")] += 1
            raise
        seconds = asyncio.get_running_loop().time() - began
        answers = [_joined(parts, seconds) for parts in zip(*found, strict=True)]
        self.counts["answered"] += 1
        self.counts["decoded"] += sum(answer.decoded for answer in answers)
        return answers

    async def _ask_piece(self, inputs: Tensor, experts: Sequence[int], deadline: float) -> list[Answer]:
        """Ask for at most one batch of inputs, and return each expert's part of the answer."""
        loop = asyncio.get_running_loop()
        wanted = sum(1 << expert for expert in experts)
        down = self._servers(lambda queue: queue.is_down)
        doubted = self._servers(lambda queue: queue.is_doubted) & ~down
        lateness, limits = None, self.limits
        if self.policy.hedges:
            fresh = Lateness(self.policy.quantile, limits.initial_lateness, limits.deadline)
            lateness = self.lateness.setdefault((wanted, len(inputs).bit_length()), fresh)
        patience = lateness.seconds if lateness and not doubted & self.layout.hosts(wanted) else 0.0
        query = _Query(inputs, self.layout, self.policy, wanted, lateness, patience > 0)
        self._pending.add(query)
        timer = loop.call_later(patience, self._become_late, query) if patience > 0 else None
        try:
            async with asyncio.timeout_at(deadline):
                self._proceed(query, query.start(lambda server: len(self.queues[server]), down))
                await query.finished
        except TimeoutError:
            told = f"no answer in {limits.deadline:g} s, still waiting for {self._names(query.expected)}"
            raise DeadlineError(f"{told}; ask again later") from None
        finally:
            if timer is not None:
                timer.cancel()
            self._pending.discard(query)
            for request in query.requests:
                request.cancelled = True
        return self._answers(query, experts)

    def _servers(self, chosen: Callable[[ServerQueue], bool]) -> int:
        return sum(1 << place for place, queue in enumerate(self.queues) if chosen(queue))

    def _names(self, servers: int) -> str:
        return ", ".join(self.queues[server].name for server in members(servers))

    def _proceed(self, query: _Query, servers: int) -> None:
        """Ask servers, and finish the query if it is answered or has failed."""
        while servers and query.state is State.pending:
            server = (servers & -servers).bit_length() - 1
            servers &= servers - 1
            request = Request(query.inputs, partial(self._deliver, query, server))
            query.requests.append(request)
            if not self.queues[server].put(request):
                request.cancelled = True
                query.full |= 1 << server
                servers |= query.lose(server)
        if query.state is State.answered:
            self._end(query, None)
        elif query.state is State.failed:
            lost, full = self._names(query.lost & ~query.full), self._names(query.full)
            if full:
                told = f"the queue of {full} is full" + (f" and {lost} lost" if lost else "")
                self._end(query, OverloadedError(f"{told}; ask again later"))
            else:
                self._end(query, LostError(f"lost {lost}, more than the others make up for; ask again later"))

    def _deliver(self, query: _Query, server: int, reply: Reply | None) -> None:
        if query.finished.done():
            return
        if reply is not None:
            query.replies[server] = reply
        self._proceed(query, query.lose(server) if reply is None else query.arrive(server))

    def _become_late(self, query: _Query) -> None:
        if not query.finished.done():
            self._proceed(query, query.become_late())

    def _end(self, query: _Query, error: ServingError | None) -> None:
        if not query.finished.done():
            query.finished.set_result(None) if error is None else query.finished.set_exception(error)

    def _answers(self, query: _Query, experts: Sequence[int]) -> list[Answer]:
        decoded: dict[int, Decoded] = {}
        used: Iterable[int] = ()
        if query.decoded:
            assert self._decodings is not None
            decoded, used = self._decodings.decode(query.replies, members(query.decoded))
        answers = []
        for expert in experts:
            by, found = used, decoded.get(expert)
            if found is None:
                by = [server for server in members(self.layout.hosts(1 << expert)) if server in query.replies][:1]
                logits = query.replies[by[0]].logits
                found = Decoded(logits, torch.zeros(len(logits)).double(), torch.ones(len(logits)).bool())
            names = tuple(self.queues[server].name for server in by)
            answers.append(Answer(expert, found.logits, expert in decoded, names, 0.0, found.risk, found.accepted))
        return answers


_ENDS: dict[type[BaseException], str] = {
    LostError: "lost", DeadlineError: "expired", DecodingError: "undecodable", asyncio.CancelledError: "cancelled",
    OverloadedError: "overloaded",
}  # fmt: skip


def _joined(parts: Sequence[Answer], seconds: float) -> Answer:
    """Join the answers to a query's pieces."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.answered_by))
    rows = [(part.logits, part.risk, part.accepted) for part in parts]
    logits, risk, accepted = (torch.cat(each) for each in zip(*rows, strict=True))
    return Answer(parts[0].expert, logits, any(part.decoded for part in parts), names, seconds, risk, accepted)
