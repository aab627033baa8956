"""When an expert's answer is late, so that the servers that stand in for it are asked too."""

import asyncio
import statistics
from collections import defaultdict, deque
from typing import Any

REMEMBERED = 100  # the last answers of an expert whose times are looked at
EXPERIENCE = 20  # with fewer answers nothing is known of an expert
SLOW = 2.0  # late is also what takes this multiple of what is late for most experts


class HedgeTimer:
    """After how many seconds an expert's answer is late: a quantile of its last answers' times.

    Queries of other sizes have times of their own. An answer that another one overtook counts with the time until then,
    which is more than the quantile: where too many are overtaken, the quantile rises.

    Args:
        quantile: In [0, 1); 0 does not wait.
        initial: The seconds before `EXPERIENCE` answers.
    """

    def __init__(self, quantile: float, initial: float) -> None:
        self._quantile = quantile
        self._initial = initial
        # By the bits of the number of a query's inputs, and by expert.
        self._times: dict[int, dict[int, deque[float]]] = defaultdict(dict)

    def seconds(self, expert: int, inputs: int) -> float:
        """Return after how many seconds an expert's answer to so many inputs is late."""
        if self._quantile == 0:
            return 0.0
        known = {}
        for each, times in self._times[inputs.bit_length()].items():
            if len(times) >= EXPERIENCE:
                place = int(self._quantile * len(times))
                known[each] = sorted(times)[place]
        own = known.get(expert, self._initial)
        return min(own, SLOW * statistics.median_low(known.values())) if known else own

    def observe(self, expert: int, inputs: int, request: "asyncio.Future[Any]") -> None:
        """Note how long a request to an expert takes from now on, or how long it is waited for."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        last = deque[float](maxlen=REMEMBERED)
        times = self._times[inputs.bit_length()].setdefault(expert, last)

        def note(request: "asyncio.Future[Any]") -> None:
            if request.cancelled() or request.result() is not None:
                times.append(loop.time() - began)

        request.add_done_callback(note)
