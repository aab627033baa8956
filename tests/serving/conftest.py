"""A virtual clock, and servers whose answers tell who gave them and to what."""

import asyncio
import io
import selectors
from functools import wraps

import torch
from PIL import Image

from coin.coding import Code, make_decoder
from coin.serving.front_end import FrontEnd
from coin.serving.policies import PolicyKind, StandIns
from coin.serving.servers import Reply, check_finite
from coin.serving.system import System

OUTPUTS = 3


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time, in seconds from 0, jumps to the next timer where everything waits."""

    def __init__(self):
        self._now = 0.0
        selector = selectors.DefaultSelector()
        selector.select = self._jump
        super().__init__(selector)

    def _jump(self, timeout=None):
        if timeout is None:
            raise RuntimeError("everything waits and no timer is set: this would hang for ever")
        self._now += max(timeout, 0.0)
        return []

    def time(self):
        return self._now


def run_virtually(main):
    """Run a coroutine on a new virtual loop; fail if a callback raised."""
    problems = []
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        loop.set_exception_handler(lambda _, context: problems.append(context))
        result = runner.run(main)
    assert not problems
    return result


def virtually(test):
    """Make a test of a coroutine that runs on a virtual loop."""

    @wraps(test)
    def run(*given, **named):
        run_virtually(test(*given, **named))

    return run


def now():
    """The running loop's time."""
    return asyncio.get_running_loop().time()


def body(data, name="images", shape=None, **more):
    """A request of the Open Inference Protocol."""
    given = {"name": name, "datatype": "BYTES", "shape": shape or [len(data)], "data": data}
    return {"inputs": [given], **more}


def encoded(array, format="PNG"):
    """An image file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format)
    return buffer.getvalue()


class LinearSystem:
    """N linear experts and exact coded models: own and decoded answers are the same, and nobody else's.

    Expert i answers x·w_i to inputs ``[B, 2]`` with random weights ``[2, 3]``; coded model r answers Σ_i β_ri x·w_i.
    As stand-ins the coded models answer with features x, which an expert's head w_i reads.
    """

    def __init__(self, matrix, policy, quantile=0.8, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.code = Code(matrix)
        experts = range(self.code.num_experts)
        self.weights = torch.randn(len(experts), 2, OUTPUTS, generator=draw).double()
        self.coded = self.code.encode(self.weights)
        self.stand_ins = StandIns(PolicyKind(policy), [f"e{place}" for place in experts], self.code)
        decoders = {}
        if self.stand_ins.which == "coded":
            heads = [(weights.T, torch.zeros(OUTPUTS)) for weights in self.weights]
            every = tuple(experts)
            decoders[every] = make_decoder("expert_head", self.code, every, heads)
        classes = {name: ["x"] * OUTPUTS for name in self.stand_ins.experts}
        self.system = System(classes, {}, self.stand_ins, decoders, True, quantile)

    def truth(self, expert, inputs):
        return inputs @ self.weights[expert]

    def reply(self, server, expert, inputs):
        if server.startswith("replica"):
            return Reply(self.truth(expert, inputs), inputs)
        weights = self.coded if server.startswith("coded") else self.weights
        return Reply(inputs @ weights[int(server[-1])], inputs)

    def front_end(self, ask, limits):
        """A front end whose servers' replies are checked as those that come from Ray are."""

        def server(name):
            async def checked(expert, inputs):
                return check_finite(await ask(name, expert, inputs))

            return checked

        servers = {name: server(name) for name in self.stand_ins.servers}
        return FrontEnd(self.system, servers, limits)


async def ask_all(front, inputs, experts=None):
    """The answers of some experts, all by default, within the front end's own time for a query."""
    every = range(len(front.system.stand_ins.experts))
    deadline = now() + front.limits.deadline
    with front.admitted():
        return await front.ask(inputs, experts or every, deadline)


async def ask_one(front, inputs, expert):
    """One expert's answer."""
    (answer,) = await ask_all(front, inputs, [expert])
    return answer


async def timed(answer):
    """An answer, and after how many seconds it came."""
    began = now()
    found = await answer
    return found, now() - began
