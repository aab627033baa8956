"""What networks answer: their logits beside the head's input, and whether the logits are the head's of it."""

import math
import threading
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin.core.batches import Batch, map_tensors, take
from coin.core.devices import double, multiplies_in_bfloat16
from coin.core.memory import is_out_of_memory
from coin.errors import DataError, HeadError, StateError, first_line
from coin.files.tensors import check_finite
from coin.networks.adapted import Adapted
from coin.networks.calling import logits_of
from coin.networks.heads import head_name, linear_head

AnsweringAs = int | Tensor | None
"""As which experts a body with adapters answers: as one, or sample by sample as several ``[B]``; others ignore it."""


def features_and_logits(
    network: nn.Module, inputs: Batch, experts: AnsweringAs = None
) -> tuple[Tensor, Tensor]:
    """Run a network once on inputs ``[B, ...]``; return its penultimate features ``[B, F]`` and its logits ``[B, C]``.

    The features are the head's input. Raises HeadError where the head does not run once, or reads several positions of
    a sample, as that of a GPT does.
    """
    if isinstance(network, Adapted):  # one pass for each expert in the batch
        both: tuple[Tensor, Tensor] = network.run(features_and_logits, inputs, experts=experts)
        return both
    head = network.get_submodule(head_name(network))
    captured: list[Tensor] = []
    thread = threading.get_ident()  # others may run the same network

    def keep(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        """Keep what the head reads in this thread."""
        if threading.get_ident() == thread:
            captured.extend((*arguments, *named.values()))

    with head.register_forward_pre_hook(keep, with_kwargs=True):
        logits = logits_of(network, inputs)
    kind = type(network).__name__
    if len(captured) != 1:
        raise HeadError(f"the head of {kind} ran {len(captured)} times in one pass, expected once")
    (features,) = captured
    if features.ndim != 2:
        raise HeadError(
            f"the head of {kind} reads inputs {list(features.shape)}, expected one row a sample [B, F]; pool positions "
            "before the head, or leave out methods and decoders that read it"
        )
    return features, logits


@torch.no_grad()
def check_as_plain(adapted: Adapted, inputs: Batch) -> None:
    """Raise StateError where a body, which makes its parameters as they are read, answers otherwise than a plain copy.

    So do networks whose forward passes read `parameters()`, ask for the class of a layer or write a weight.
    """
    inputs = take(inputs, slice(0, 2))
    expected = run_network(adapted.network(0), inputs, features=False).logits
    types = {each.dtype for each in adapted.parameters() if each.is_floating_point()}
    precision = max(torch.finfo(dtype).eps for dtype in types)
    tolerance = precision**0.5 * float(expected.abs().max())
    try:
        logits = run_network(adapted, inputs, features=False, experts=0).logits
        difference = float((logits - expected).abs().max())
        reason = f"a difference of {difference:.3g}"
    except Exception as error:  # of any kind: the plain copy has run
        if is_out_of_memory(error):
            raise
        difference = math.inf
        reason = first_line(error)
    if not difference <= tolerance:
        raise StateError(
            f"{type(adapted.body).__name__} answers otherwise where its layers make their weights as they are read "
            f"({reason:.80}), expected the same; read weights as attributes of their layers, and write none, or leave "
            "out adapters and compress"
        )


class Run(NamedTuple):
    """What one network answers: penultimate features ``[B, F]``, F = 0 where not wanted, and logits ``[B, C]``."""

    features: Tensor
    logits: Tensor


def run_network(
    network: nn.Module, inputs: Batch, features: bool, experts: AnsweringAs = None
) -> Run:
    """Run a network once on a copy of the inputs, with its penultimate features if they are wanted."""
    inputs = map_tensors(torch.clone, inputs)
    found = None
    if features:
        found, logits = features_and_logits(network, inputs, experts)
    elif isinstance(network, Adapted):
        logits = network.run(logits_of, inputs, experts=experts)
    else:
        logits = logits_of(network, inputs)
    shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise DataError(
            f"found {shape} of {type(network).__name__}, expected logits [B, C]; wrap it in a module that returns them"
        )
    if found is None:
        found = logits[:, :0]
    return Run(full_precision(found), full_precision(logits))


def centred(logits: Tensor) -> Tensor:
    """Return logits [P, C] less their mean over the classes; a single output as it is."""
    if logits.shape[1] == 1:
        return logits
    return logits - logits.mean(1, keepdim=True)


def full_precision(values: Tensor) -> Tensor:
    """Return values that autocast left in 16 bits as float32, in which answers are compared, and others as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


# How far logits of a type may be from the head's, in the size of the sum's terms: four times the type's precision, for
# float32 that of TF32, in which GPUs compute it. Float64 has no such short cut; its room is for long sums.
_TOLERANCES = {
    torch.float64: 2.0**-30,
    torch.float32: 2.0**-8,
    torch.float16: 2.0**-8,
    torch.bfloat16: 2.0**-5,
}


@torch.no_grad()
def check_head(network: nn.Module, features: Tensor, logits: Tensor) -> None:
    """Raise HeadError unless a network's logits are W φ + b, with (W, b) its head and φ the head's input.

    A temperature, a softmax or a nonlinearity after the head breaks what methods that fit a head assume, and so does a
    head that is no Linear layer. Features ``[B, F]`` and logits ``[B, C]`` are those of `features_and_logits`. Every
    logit is compared, in float64, in units of |Wφ + b| + √(Σ_k (W_k φ_k)² + b²), in which rounding errors grow whatever
    cancels. Raises StateError where an output is not finite.
    """
    kind = type(network).__name__
    check_finite({"logits": logits, "head's inputs": features}, f"an answer of {kind}")
    head = linear_head(network)
    weight = double(head.weight)
    bias = weight.new_zeros(len(weight)) if head.bias is None else double(head.bias)
    inputs = double(features)
    read = F.linear(inputs, weight, bias)
    squares = F.linear(inputs.square(), weight.square(), bias.square())
    size = read.abs() + squares.sqrt()
    types = {features.dtype, logits.dtype, head.weight.dtype}
    if torch.float32 in types and multiplies_in_bfloat16():
        types.add(torch.bfloat16)
    tolerance = max(_TOLERANCES[each] for each in types)
    error = torch.full_like(read, torch.inf)
    if logits.shape == read.shape:
        error = (double(logits) - read).abs()
    if not bool((error <= tolerance * size).all()):
        raise HeadError(
            f"the logits of {kind} are not its head '{head_name(network)}' of its input (found a difference of "
            f"{float(error.max()):.3g}); name the layer that gives the logits in an attribute 'head_name', or leave "
            "out what reads it"
        )


@torch.no_grad()
def linear_heads(
    networks: Iterable[nn.Module],
    inputs: Batch | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Return every network's head as its weight ``[C, F]`` and bias ``[C]``.

    The networks, in eval mode, are checked by `check_head` on the inputs, if there are any.
    """
    heads = []
    for network in networks:
        if inputs is not None:
            own = map_tensors(torch.clone, inputs)
            check_head(network, *features_and_logits(network, own))
        head = linear_head(network)
        weight = full_precision(head.weight.detach())  # as features are
        bias = weight.new_zeros(len(weight))
        if head.bias is not None:
            bias = full_precision(head.bias.detach())
        heads.append((weight, bias))
    return heads
