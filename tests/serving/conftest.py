"""A virtual clock, and servers whose answers tell who gave them and to what."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import torch

from coin.coding import Code, make_decoder
from coin.serving.decodings import Decodings, coded_layout, standin_layout
from coin.serving.front_end import FrontEnd
from coin.serving.layout import Layout, spread_copies
from coin.serving.policies import Policy, PolicyKind
from coin.serving.replies import Answer, Reply, ReplyFormat

OUTPUTS = 3


async def ask_all(front: FrontEnd, inputs: torch.Tensor, experts: Sequence[int] | None = None) -> list[Answer]:
    """Return experts' answers, all by default, within the front end's own time for a query."""
    deadline = asyncio.get_running_loop().time() + front.limits.deadline
    with front.admitted():
        return await front.ask_experts(
            inputs, range(front.layout.num_experts) if experts is None else experts, deadline
        )


async def ask_one(front: FrontEnd, inputs: torch.Tensor, expert: int) -> Answer:
    """Return one expert's answer."""
    return (await ask_all(front, inputs, [expert]))[0]


class _NoFiles(selectors.DefaultSelector):
    """Waits for nothing: instead of sleeping, it lets the loop's clock jump to the next timer."""

    def __init__(self, loop: "VirtualLoop") -> None:
        super().__init__()
        self.loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits and no timer is set: this would hang for ever")
        self.loop.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only where everything waits."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_NoFiles(self))

    def time(self) -> float:
        return self.now


def run_virtually(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on a new virtual loop; fail if a callback raised or a task was left over."""
    problems: list[dict[str, Any]] = []
    loop = VirtualLoop()
    loop.set_exception_handler(lambda _, context: problems.append(context))
    try:
        result = loop.run_until_complete(main)
        left = [task for task in asyncio.all_tasks(loop) if task.get_name().startswith("server ")]
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()
    assert not left
    assert not problems
    return result


@pytest.fixture(scope="session")
def virtually() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Return `run_virtually`."""
    return run_virtually


class LinearSystem:
    """N linear experts and exact coded models: own and decoded answers are the same, and nobody else's.

    Expert i answers x·w_i to inputs ``[B, 2]`` with random weights ``[2, 3]``; coded model r answers Σ_i β_ri x·w_i.
    As stand-ins the coded models answer with features x, which an expert's head w_i reads.
    """

    def __init__(self, matrix: list[list[float]], seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.code = Code(matrix)
        self.weights = torch.randn(self.code.num_experts, 2, OUTPUTS, generator=draw, dtype=torch.float64)
        self.coded = self.code.encode(self.weights)
        self.decodings = Decodings(self.code)
        heads = [(weights.T, torch.zeros(OUTPUTS)) for weights in self.weights]
        self.heads = Decodings(self.code, [make_decoder("expert_head", self.code, range(len(heads)), heads)])
        self.expects = ReplyFormat(OUTPUTS)

    def layout(self, policy: Policy) -> Layout:
        """Return the servers of a policy, with copies in place of as many coded models."""
        if policy.kind is PolicyKind.standin:
            return standin_layout(self.code, every_row=False)
        return coded_layout(self.code) if policy.coded else spread_copies(self.code.num_experts, self.code.num_coded)

    def decodings_of(self, policy: Policy) -> Any:
        """Return what decodes for a policy."""
        return self.heads if policy.kind is PolicyKind.standin else self.decodings if policy.coded else None

    def truth(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weights[expert]

    def reply(self, server: int, inputs: torch.Tensor) -> Reply:
        count = self.code.num_experts
        return Reply(inputs @ (self.weights[server] if server < count else self.coded[server - count]), inputs)


@pytest.fixture(scope="session")
def linear_system() -> type[LinearSystem]:
    """Return the class `LinearSystem`."""
    return LinearSystem
