"""The front end: asks an expert's server and, by a policy, those that stand in."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from coin.errors import DeadlineError, LostError, OverloadedError, ServingError
from coin.serving.breaker import Breaker, Call
from coin.serving.hedge import HedgeTimer
from coin.serving.limits import Limits
from coin.serving.system import Answer, System

# The requests of a query's inputs, by server and the expert that it is asked as.
Shared = dict[tuple[str, int], asyncio.Future[Any]]


class FrontEnd:
    """Answers queries from experts and, where an expert is late or lost, from the servers that stand in for it.

    Every query gets one answer for each expert or one error, by its deadline at the latest, in the event loop's time.
    """

    def __init__(self, system: System, servers: Mapping[str, Call], limits: Limits) -> None:
        self.system = system
        self.limits = limits
        self.servers = {name: Breaker(name, call, limits) for name, call in servers.items()}
        self.hedge = HedgeTimer(system.quantile, limits.initial_lateness)
        self._running = 0
        self._is_draining = False

    async def drain(self) -> None:
        """Take no more queries, and wait for the running ones, which end by their deadline."""
        self._is_draining = True
        while self._running > 0:
            await asyncio.sleep(0.05)

    def lost(self, expert: int) -> list[str]:
        """Return the servers whose loss keeps an expert from being answered for; none where the others suffice."""
        stand_ins = self.system.stand_ins
        names = [stand_ins.experts[expert], *stand_ins.of[expert]]
        lost = [name for name in names if self.servers[name].is_lost]
        up = [name for name in names if name not in lost]
        is_answered = names[0] in up or stand_ins.suffice(expert, up)
        return [] if is_answered else lost

    def is_ready(self, experts: Sequence[int]) -> bool:
        """Return whether queries for these experts are taken, and the servers that are not lost suffice for them."""
        return not self._is_draining and not any(self.lost(expert) for expert in experts)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a query as running until the end of the block; ServingError where no more are taken."""
        if self._is_draining:
            raise ServingError("the front end stops; ask again later")
        if self._running >= self.limits.queries:
            raise OverloadedError(
                f"{self._running} queries are running, the most there may be; ask again later"
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def ask(self, inputs: Any, experts: Sequence[int], deadline: float) -> list[Answer]:
        """Return some experts' answers to a query's inputs, by a time of the loop.

        Raises LostError where the remaining servers cannot answer, OverloadedError where one of these is only full, and
        DeadlineError where no answer came in time.
        """
        shared: Shared = {}
        queries = [_Query(self, expert, inputs, shared) for expert in experts]
        answering = [query.answer() for query in queries]
        try:
            async with asyncio.timeout_at(deadline):
                answers = await asyncio.gather(*answering, return_exceptions=True)
        except TimeoutError:
            names = ", ".join(self.system.stand_ins.experts[expert] for expert in experts)
            limit = self.limits.deadline
            raise DeadlineError(f"no answer in {limit:g} s for {names}; ask again later") from None
        finally:
            for (name, _), request in shared.items():
                self.servers[name].withdraw(request)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers  # type: ignore[return-value]  # no exception is left


class _Query:
    """A query for one expert, and its requests by server; `shared` are those of all experts of the same inputs."""

    def __init__(self, front: FrontEnd, expert: int, inputs: Any, shared: Shared) -> None:
        self._front = front
        self._stand_ins = front.system.stand_ins
        self._expert = expert
        self._own = self._stand_ins.experts[expert]
        self._others = self._stand_ins.of[expert]
        self._inputs = inputs
        self._shared = shared
        self._asked: dict[str, asyncio.Future[Any]] = {}

    async def answer(self) -> Answer:
        """Return the expert's own answer if it comes in time, else the first that suffices; a ServingError if none can.

        Who is not asked for being silent is asked at last.
        """
        await self._ask_own()
        while True:
            found = self._found()
            if found is not None:
                return found
            known = len(self._asked)
            self._ask_others()
            if len(self._asked) > known:
                continue  # another expert's request to the same server may have ended
            pending = {name: request for name, request in self._asked.items() if not request.done()}
            may_suffice = self._stand_ins.suffice(self._expert, {*self._replies(), *pending})
            if self._own in pending or may_suffice:
                await asyncio.wait(pending.values(), return_when=asyncio.FIRST_COMPLETED)
            elif self._own not in self._asked:
                self._ask(self._own)
            else:
                raise self._failure()

    async def _ask_own(self) -> None:
        """Ask the expert's server, and wait until its answer is late.

        Nobody waits for a server that is lost, or silent for longer than makes an answer late; it is asked all the same
        if nobody else does.
        """
        server = self._front.servers[self._own]
        moment = self._stand_ins.moment
        number = len(self._inputs)
        patience = None
        if moment != "lost":
            patience = self._front.hedge.seconds(self._expert, number)
        is_silent = patience is not None and 0 < patience < server.silence()
        is_doubted = server.is_lost or is_silent
        is_left_out = is_doubted and server.pending and self._others
        if not is_left_out:
            self._ask(self._own)
        is_busy = len(server.pending) > 1  # then it has to do with queries for itself
        if moment == "at once" and not is_busy:
            self._ask_others()
        if not is_doubted:
            request = self._asked[self._own]
            self._front.hedge.observe(self._expert, number, request)
            await asyncio.wait({request}, timeout=patience)

    def _ask_others(self) -> None:
        """Ask the servers that stand in for the expert, unless those that take a request are too few."""
        servers = self._front.servers
        free = [name for name in self._others if not servers[name].is_full()]
        if self._stand_ins.suffice(self._expert, {*self._asked, *free}):
            for name in self._others:
                self._ask(name)

    def _ask(self, name: str) -> None:
        """Ask a server, if these inputs were not sent to it yet."""
        place = self._stand_ins.asked_as(name, self._expert)
        if (name, place) not in self._shared:
            request = self._front.servers[name].request(place, self._inputs)
            self._shared[name, place] = request
        self._asked[name] = self._shared[name, place]

    def _replies(self) -> dict[str, Any]:
        """Return the replies so far, by server."""
        results = {
            name: request.result() for name, request in self._asked.items() if request.done()
        }
        return {name: reply for name, reply in results.items() if reply is not None}

    def _found(self) -> Answer | None:
        """Return the expert's own answer, a replica's, or the decoded one; None where replies are too few."""
        replies = self._replies()
        is_whole = self._own in replies or self._stand_ins.which == "replica"
        if replies and is_whole:
            name = self._own if self._own in replies else next(iter(replies))
            return Answer(replies[name].logits, (name,))
        if not self._stand_ins.suffice(self._expert, replies):
            return None
        return self._front.system.decode(self._expert, replies)

    def _failure(self) -> ServingError:
        """Return why there is no answer."""
        lost = ", ".join(self._front.lost(self._expert))
        if lost:
            return LostError(f"lost {lost}, more than the others make up for; ask again later")
        return OverloadedError(
            f"those that answer for {self._own} cannot take more; ask again later"
        )
