"""How long networks and decoders take, measured on one processor core, as `coin serve` runs its servers by default."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from coin.coding import Answers, Code, DecoderConfig, make_decoder
from coin.serving.decodings import Decodings
from coin.serving.model import NetworkServer
from coin.serving.replies import Reply, ReplyFormat

_WARM_UP, _REPEATS, _BATCH = 20, 200, 8


def measure_service(server: NetworkServer) -> tuple[NDArray[np.float64], float]:
    """Return a server's seconds for one input ``[200]``, and the share of it that each further input of 8 adds.

    The share is of the medians, and at least 0.
    """
    one = server.probe
    if one.dtype == torch.uint8:
        one = torch.randint(256, tuple(one.shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    several = one.repeat(_BATCH, *[1] * (one.ndim - 1))
    times = measure_times(lambda: server(one))
    more = measure_times(lambda: server(several), _REPEATS // _BATCH)
    return times, max(0.0, float(np.median(more) / np.median(times) - 1) / (_BATCH - 1))


def measure_decoding(
    code: Code, config: DecoderConfig, expects: ReplyFormat, feature_widths: Sequence[int] | None = None
) -> float:
    """Return the median seconds that it takes to decode one expert's answer to one input.

    The decoder is fitted on random numbers: its speed does not depend on them.
    """
    draw = torch.Generator().manual_seed(0)
    count, servers, width = code.num_experts, code.num_experts + code.num_coded, expects.features
    samples = 64
    logits = torch.randn(servers, samples, expects.outputs, generator=draw)
    features = None if width is None else torch.randn(servers, samples, width, generator=draw).unbind()
    halves = features and features[:count], features and features[count:]
    answers = Answers(logits[:count], logits[count:], *halves, tasks=torch.arange(samples) % count)
    lost = [0] if config.reads_survivors else range(count)
    heads = [(torch.randn(expects.outputs, width or 1, generator=draw), torch.zeros(expects.outputs))] * count
    decodings = Decodings(code, [make_decoder(config, code, lost, heads).fit(answers)], feature_widths)
    arrived = {
        server: Reply(logits[server, :1], None if features is None else features[server][:1])
        for server in range(1, servers)
    }
    return float(np.median(measure_times(lambda: decodings.decode(arrived, [0]))))


def measure_times(action: Callable[[], object], repeats: int = _REPEATS) -> NDArray[np.float64]:
    """Return the processor time of an action on one core, in seconds ``[repeats]``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = np.empty(min(_WARM_UP, repeats) + repeats)
        for place in range(len(times)):
            started = time.process_time()  # not a clock's: others may be at work on this machine
            action()
            times[place] = time.process_time() - started
        return times[-repeats:]
    finally:
        torch.set_num_threads(threads)
