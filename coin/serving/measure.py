"""How long this machine takes for a query: a network's forward pass, and a decoder's.

With one thread, as `coin serve` runs its servers unless it is told otherwise.
"""

import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from coin.coding import Answers, Code, DecoderConfig, make_decoder
from coin.errors import CoinWarning
from coin.serving.decodings import Decodings
from coin.serving.model import NetworkServer
from coin.serving.replies import Reply, ReplyFormat

_WARM_UP, _REPEATS = 20, 200
_IDLE = 0.9
"""The share of the wall time that a process uses a processor for where it has one of its own."""


def measure_service(server: NetworkServer) -> NDArray[np.float64]:
    """Return the seconds that a server takes for one image, 200 times after 20 that do not count ``[200]``."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(256, (1, 3, server.image_size, server.image_size), generator=draw, dtype=torch.uint8)
    return _times(lambda: server(image))


def measure_decoding(
    code: Code, config: DecoderConfig, expects: ReplyFormat, feature_widths: Sequence[int] | None = None
) -> NDArray[np.float64]:
    """Return the seconds that it takes to decode one expert's answer to one image ``[200]``.

    The decoder is fitted on random numbers: what it takes does not depend on them.

    Args:
        code: The code.
        config: The decoder.
        expects: The format of the servers' replies.
        feature_widths: The widths of the stages within their features.
    """
    draw = torch.Generator().manual_seed(0)
    count, rows = code.num_experts, code.num_coded
    samples = 64 + 2 * (config.components or 0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    features = None if expects.features is None else [random(samples, expects.features) for _ in range(count + rows)]
    decoder = make_decoder(config, code, [0]).fit(
        Answers(
            experts=random(count, samples, expects.outputs),
            coded=random(rows, samples, expects.outputs),
            expert_features=None if features is None else features[:count],
            coded_features=None if features is None else features[count:],
            feature_widths=feature_widths,
            tasks=torch.arange(samples) % count,
        )
    )
    decodings = Decodings(code, [decoder], feature_widths)
    replies = {
        server: Reply(random(1, expects.outputs), None if expects.features is None else random(1, expects.features))
        for server in range(1, count + rows)
    }
    return _times(lambda: decodings.decode(replies))


def _times(action: Callable[[], object]) -> NDArray[np.float64]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _timed(action)
    finally:
        torch.set_num_threads(threads)


def _timed(action: Callable[[], object]) -> NDArray[np.float64]:
    times = np.empty(_WARM_UP + _REPEATS)
    processor = time.process_time()
    for place in range(len(times)):
        started = time.perf_counter()
        action()
        times[place] = time.perf_counter() - started
    if time.process_time() - processor < _IDLE * times.sum():
        warnings.warn(
            "this process had to wait for a processor while service times were measured; they are too long, measure "
            "again when nothing else runs",
            CoinWarning,
            stacklevel=2,
        )
    return times[_WARM_UP:]
