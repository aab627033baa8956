"""A virtual clock, and servers whose answers tell who gave them and to what."""

import asyncio
import io
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from PIL import Image

from coin.coding import Code, make_decoder
from coin.serving.front_end import FrontEnd
from coin.serving.limits import Limits
from coin.serving.policies import PolicyKind, StandIns
from coin.serving.servers import Reply, check_finite
from coin.serving.system import Answer, System

OUTPUTS = 3


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time, in seconds from 0, jumps to the next timer where everything waits."""

    def __init__(self) -> None:
        self._now = 0.0
        selector = selectors.DefaultSelector()
        selector.select = self._jump  # type: ignore[method-assign]
        super().__init__(selector)

    def _jump(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everything waits and no timer is set: this would hang for ever")
        self._now += max(timeout, 0.0)
        return []

    def time(self) -> float:
        return self._now


def body(data: Any, name: str = "images", datatype: str = "BYTES", **more: Any) -> dict[str, Any]:
    """Return a request of the Open Inference Protocol."""
    return {"inputs": [{"name": name, "datatype": datatype, "shape": [len(data)], "data": data}], **more}


def encoded(array: np.ndarray, format: str = "PNG") -> bytes:
    """Return an image file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format)
    return buffer.getvalue()


def run_virtually(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on a new virtual loop; fail if a callback raised."""
    problems: list[dict[str, Any]] = []
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: problems.append(context))
        result = runner.run(main)
    assert not problems
    return result


def virtually(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a test of a coroutine that runs on a virtual loop."""

    @wraps(test)
    def run(*given: Any, **named: Any) -> None:
        run_virtually(test(*given, **named))

    return run


class LinearSystem:
    """N linear experts and exact coded models: own and decoded answers are the same, and nobody else's.

    Expert i answers x·w_i to inputs ``[B, 2]`` with random weights ``[2, 3]``; coded model r answers Σ_i β_ri x·w_i.
    As stand-ins the coded models answer with features x, which an expert's head w_i reads.
    """

    def __init__(self, matrix: list[list[float]], policy: PolicyKind, quantile: float = 0.8, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.code = Code(matrix)
        count = self.code.num_experts
        self.weights = torch.randn(count, 2, OUTPUTS, generator=draw, dtype=torch.float64)
        self.coded = self.code.encode(self.weights)
        self.stand_ins = StandIns(policy, [f"e{place}" for place in range(count)], self.code)
        every = tuple(range(count))
        heads = [(weights.T, torch.zeros(OUTPUTS)) for weights in self.weights]
        decoders = {}
        if self.stand_ins.which == "coded":
            decoders = {every: make_decoder("expert_head", self.code, every, heads)}
        classes = {name: ["x"] * OUTPUTS for name in self.stand_ins.experts}
        self.system = System(classes, {}, self.stand_ins, decoders, True, quantile)

    def truth(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weights[expert]

    def reply(self, server: str, expert: int, inputs: torch.Tensor) -> Reply:
        if server.startswith("replica"):
            return Reply(self.truth(expert, inputs), inputs)
        weights = self.coded if server.startswith("coded") else self.weights
        return Reply(inputs @ weights[int(server[-1])], inputs)

    def front_end(self, ask: Callable[[str, int, torch.Tensor], Awaitable[Any]], limits: Limits) -> FrontEnd:
        """Return a front end whose servers' replies are checked as those that come from Ray are."""

        def server(name: str) -> Callable[[int, torch.Tensor], Awaitable[Reply]]:
            async def checked(expert: int, inputs: torch.Tensor) -> Reply:
                return check_finite(await ask(name, expert, inputs))

            return checked

        return FrontEnd(self.system, {name: server(name) for name in self.stand_ins.servers}, limits)


async def ask_all(front: FrontEnd, inputs: torch.Tensor, experts: Sequence[int] | None = None) -> list[Answer]:
    """Return experts' answers, all by default, within the front end's own time for a query."""
    deadline = asyncio.get_running_loop().time() + front.limits.deadline
    with front.admitted():
        return await front.ask(inputs, experts or range(len(front.system.stand_ins.experts)), deadline)


async def ask_one(front: FrontEnd, inputs: torch.Tensor, expert: int) -> Answer:
    """Return one expert's answer."""
    return (await ask_all(front, inputs, [expert]))[0]


async def timed(answer: Awaitable[Answer]) -> tuple[Answer, float]:
    """Return an answer, and after how many seconds it came."""
    began = asyncio.get_running_loop().time()
    return await answer, asyncio.get_running_loop().time() - began
