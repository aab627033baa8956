"""Forward passes that stop after every ruled call, so that several networks go through their layers side by side."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from coin.batches import Batch, as_input, size_of, take
from coin.errors import StateError
from coin.merging.units import Unit
from coin.statistics.guard import evaluating
from coin.statistics.recognise import Interceptor
from coin.statistics.rules.call import Call

MOST_PIECES = 16
"""Every network of every piece is a thread: beyond, pieces are not paused side by side."""

_SAME = "give experts that make the same calls whatever their inputs"


class Stop(NamedTuple):
    """Where a pass stands: after a call in which the parameter of this name plays the weight."""

    weight: str
    call: Call
    output: Tensor


class PausedPass:
    """A forward pass of a network in eval mode, in a thread of its own that runs only while it is asked to.

    A thread is what can stop inside any network's forward. Never do two run at once. `trail` has the weights of the
    calls that it has made, in their order.
    """

    def __init__(self, network: nn.Module, inputs: Batch) -> None:
        self._network, self._inputs = network, inputs
        self.trail: list[str] = []
        self._names = dict(network.named_parameters())
        self._ask: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
        self._tell: queue.SimpleQueue[Stop | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def reach(self, weight: str, again: bool = False) -> Stop:
        """Go on until it stands after the call of a weight.

        If `again`, the call that it stands at is done again first, since its parameters have changed.
        """
        while True:
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._ask.put(again)
            stop, again = self._tell.get(), False
            if isinstance(stop, BaseException):
                raise stop
            if stop is None:
                raise StateError(
                    f"a network's forward pass came to its end without '{weight}', which another network calls; {_SAME}"
                )
            if stop.weight == weight:
                return stop

    def close(self) -> None:
        """End the pass where it stands."""
        if self._thread.is_alive():
            self._ask.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            # What holds for one thread alone; the rest of `evaluating` is entered by who starts the passes.
            with torch.inference_mode(False), torch.no_grad(), Interceptor(self._names, self._visit):
                self._network(as_input(self._inputs, self._network))
            self._tell.put(None)
        except _Ended:
            pass
        except BaseException as error:
            self._tell.put(error)

    def _visit(self, call: Call, names: dict[str, str], function: Callable[[], Tensor]) -> Tensor | None:
        if (weight := names.get("weight")) is None:
            return None
        output = function()
        self.trail.append(weight)
        self._tell.put(Stop(weight, call, output))
        again = self._ask.get()
        if again is None:
            raise _Ended
        return function() if again else output


class _Ended(BaseException):
    """Unwinds a pass that is not to go on."""


class Look(NamedTuple):
    """A unit of calls as the coded network and the experts meet it on some samples.

    Attributes:
        call: The coded network's first call of the unit, with its input.
        output: What the call returns with its present parameters.
        targets: Every expert's output of the unit's last call; none where it has no samples here.
        places: Of every expert, where its samples are among the coded network's, int64.
        samples: Where the coded network's samples are among all.
    """

    call: Call
    output: Tensor
    targets: list[Tensor | None]
    places: list[Tensor]
    samples: slice


class Walk:
    """The coded network and the experts on their way through the network's units.

    Within its context, from the first unit on behind which the activations of all samples fit, every network goes on
    from unit to unit, and the coded network does a call again after it was changed. For the units before that one the
    networks run from their inputs anew. Samples are taken in pieces that fit at the widest.

    Of all samples [P, …] every expert runs on its part, at the rising places given. `fitting` returns how many samples
    may run together, given the floats that one has alive, and `widest` is the largest number of these. `passes` counts
    forward-equivalents; a pass that was not brought to its end counts as one.
    """

    def __init__(
        self,
        coded: nn.Module,
        experts: Sequence[nn.Module],
        inputs: Batch,
        parts: Sequence[Tensor],
        fitting: Callable[[int], int],
        widest: int,
    ) -> None:
        self._networks, self._inputs, self._parts = [coded, *experts], inputs, parts
        self._fitting, self._samples = fitting, size_of(inputs)
        self._starts = range(0, self._samples, fitting(widest))
        self._groups: list[_Group] = []
        self._stack = ExitStack()
        self.passes = 0.0

    def __enter__(self) -> Self:
        for network in self._networks:
            self._stack.enter_context(evaluating(network, gradients=False))
        return self

    def __exit__(self, *_: object) -> None:
        for group in self._groups:
            group.close()
        self._stack.close()

    def looks(self, unit: Unit) -> Iterator[Look]:
        """Yield the looks at the next unit, of every piece of the samples."""
        if self._fitting(unit.floats) >= self._samples and len(self._starts) <= MOST_PIECES:
            if not self._groups:  # from here on the coded network does every call twice
                self._groups = [self._start(first, times=2) for first in self._starts]
            for group in self._groups:
                yield group.reach(unit.weight, unit.end)
            return
        for first in self._starts:
            self._groups = [self._start(first)]  # closed at the latest where the walk ends
            yield self._groups[0].reach(unit.weight, unit.end)
            self._groups.pop().close()

    def _start(self, first: int, times: int = 1) -> "_Group":
        samples = slice(first, min(first + self._starts.step, self._samples))
        inside = [part[(part >= samples.start) & (part < samples.stop)] - samples.start for part in self._parts]
        self.passes += times * (samples.stop - samples.start) + sum(map(len, inside))
        inputs = take(self._inputs, samples)
        own = [inputs, *(take(inputs, places) for places in inside)]
        passes = [PausedPass(network, x) for network, x in zip(self._networks, own, strict=True)]
        return _Group(passes, inside, samples)


class _Group:
    """The passes of all networks on the same samples."""

    def __init__(self, passes: list[PausedPass], places: list[Tensor], samples: slice) -> None:
        self._passes, self._places, self._samples = passes, places, samples
        self._has_changed = False

    def reach(self, weight: str, end: str) -> Look:
        coded, *experts = self._passes
        stop = coded.reach(weight, self._has_changed)
        self._has_changed = True
        targets: list[Tensor | None] = []
        for expert, place in zip(experts, self._places, strict=True):
            target = expert.reach(end).output if len(place) else None
            if target is not None:
                self._check(expert, len(place), target, stop, end)
            targets.append(target)
        return Look(stop.call, stop.output, targets, self._places, self._samples)

    def _check(self, expert: PausedPass, samples: int, target: Tensor, stop: Stop, end: str) -> None:
        """Raise StateError where an expert has made other calls than the coded network, or gives another shape."""
        trail = self._passes[0].trail + ([end] if end != stop.weight else [])
        for theirs, own in zip(expert.trail, trail, strict=False):
            if theirs != own:
                raise StateError(f"an expert calls '{theirs}' where the coded network calls '{own}'; {_SAME}")
        found = [len(target) // samples, *target.shape[1:]]
        expected = [len(stop.output) // (self._samples.stop - self._samples.start), *stop.output.shape[1:]]
        if found != expected:
            raise StateError(
                f"'{end}' gives {found} a sample in an expert and {expected} in the coded network; {_SAME}"
            )

    def close(self) -> None:
        for each in self._passes:
            each.close()
