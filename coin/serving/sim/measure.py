"""What this machine takes for a query, and what networks are worth whose weights are rounded.

In seconds of one processor core, as `coin serve` runs its servers unless it is told otherwise.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coin.coding import Answers, Code, DecoderConfig, make_decoder
from coin.data.transform import to_input
from coin.networks import load_network
from coin.serving.decodings import Decodings
from coin.serving.model import NetworkServer
from coin.serving.replies import Reply, ReplyFormat
from coin.serving.sim.profile import Precision

_WARM_UP, _REPEATS, _BATCH = 20, 200, 8


def rounded(values: Tensor, precision: Precision) -> tuple[Tensor, int]:
    """Return what a tensor is once it was kept in a precision, and the bytes that it took."""
    whole = precision is Precision.full or not values.is_floating_point()
    if whole or (precision is Precision.int8 and values.ndim < 2):
        return values, values.numel() * values.element_size()
    if precision is Precision.half:
        return values.half().to(values.dtype), 2 * values.numel()
    scale = values.flatten(1).abs().amax(1).clamp(min=torch.finfo(values.dtype).tiny) / 127
    scale = scale.view(-1, *[1] * (values.ndim - 1))
    return (values / scale).round() * scale, values.numel() + 4 * len(values)


def kept_bytes(path: Path, precision: Precision = Precision.full) -> int:
    """Return the bytes of a network's weights and buffers in a precision."""
    return sum(rounded(values, precision)[1] for values in load_network(path).network.state_dict().values())


@torch.no_grad()
def measure_accuracy(path: Path, precision: Precision, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the accuracy of a network with rounded weights on a test set's inputs, as they are stored, and labels."""
    file = load_network(path)
    state = {name: rounded(values, precision)[0] for name, values in file.network.state_dict().items()}
    file.network.load_state_dict(state)
    right = count = 0
    for stored, labels in batches:
        logits = file.network(to_input(stored, file.config.image_size))
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return right / count


def measure_service(server: NetworkServer) -> tuple[NDArray[np.float64], float]:
    """Return the seconds that a server takes for one input ``[200]``, and what each further one of 8 adds, as a share.

    The share is of medians, and not negative.
    """
    draw = torch.Generator().manual_seed(0)
    one = server.probe
    if one.dtype == torch.uint8:
        one = torch.randint(256, tuple(one.shape), generator=draw, dtype=torch.uint8)
    several = one.repeat(_BATCH, *[1] * (one.ndim - 1))
    times = _times(lambda: server(one))
    more = _times(lambda: server(several), _REPEATS // _BATCH)
    return times, max(0.0, float(np.median(more) / np.median(times) - 1) / (_BATCH - 1))


def measure_decoding(
    code: Code, config: DecoderConfig, expects: ReplyFormat, feature_widths: Sequence[int] | None = None
) -> float:
    """Return the median seconds that it takes to decode one expert's answer to one input.

    The decoder is fitted on random numbers: what it takes does not depend on them.

    Args:
        code: The code.
        config: The decoder.
        expects: The format of the servers' replies.
        feature_widths: The widths of the stages within their features.
    """
    draw = torch.Generator().manual_seed(0)
    count, servers, width = code.num_experts, code.num_experts + code.num_coded, expects.features
    samples = 64 + 2 * (config.components or 0)
    logits = torch.randn(servers, samples, expects.outputs, generator=draw)
    features = None if width is None else torch.randn(servers, samples, width, generator=draw).unbind()
    answers = Answers(
        experts=logits[:count],
        coded=logits[count:],
        expert_features=features and features[:count],
        coded_features=features and features[count:],
        feature_widths=feature_widths,
        tasks=torch.arange(samples) % count,
    )
    decodings = Decodings(code, [make_decoder(config, code, [0]).fit(answers)], feature_widths)
    arrived = {
        server: Reply(logits[server, :1], None if features is None else features[server][:1])
        for server in range(1, servers)
    }
    return float(np.median(_times(lambda: decodings.decode(arrived))))


def _times(action: Callable[[], object], repeats: int = _REPEATS) -> NDArray[np.float64]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = np.empty(_WARM_UP + repeats)
        for place in range(len(times)):
            started = time.process_time()  # not a clock's: others may be at work on this machine
            action()
            times[place] = time.process_time() - started
        return times[_WARM_UP:]
    finally:
        torch.set_num_threads(threads)
