"""What networks answer: their logits beside the head's input, and whether the logits are the head's of it."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin.core.batches import Batch, map_tensors, take
from coin.core.devices import device_of, double, multiplies_in_bfloat16
from coin.errors import DataError, HeadError, NumericalError
from coin.networks.adapted import Adapted
from coin.networks.calling import explained_inputs
from coin.networks.heads import ADVICE, head_name


def check_padding(padded: nn.Module, own: nn.Module, inputs: Batch) -> None:
    """Raise HeadError where a padded network's logits are not the network's own with zeros behind them."""
    if padded is own:
        return
    found, expected = padded(inputs), own(inputs)
    wider = found.shape[1] - expected.shape[1]
    if wider <= 0 or not torch.allclose(found, F.pad(expected, (0, wider)), rtol=1e-2, atol=1e-4):
        told = f"the logits of {type(own).__name__} are not those of its head '{head_name(own)}'"
        raise HeadError(f"{told}, which is padded since class counts differ; {ADVICE}")


def features_and_logits(network: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
    """Run a network once on inputs ``[B, ...]``; return its penultimate features ``[B, F]`` and its logits ``[B, C]``.

    The features are the head's input. Where that has positions, those of the position at which the head gives the
    logits, as the last token of a GPT, or else the average over positions.
    """
    if isinstance(network, Adapted):  # one pass for each expert in the batch
        both: tuple[Tensor, Tensor] = network.run(features_and_logits, inputs)
        return both
    head = network.get_submodule(head_name(network))
    captured: list[tuple[Tensor, Tensor]] = []
    thread = threading.get_ident()  # others may run the same network

    def keep(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        if threading.get_ident() == thread:
            captured.append((next(iter((*arguments, *named.values()))), output))

    with head.register_forward_hook(keep, with_kwargs=True):
        logits = network(inputs)
    if len(captured) != 1:
        raise HeadError(f"the head of {type(network).__name__} ran {len(captured)} times in one pass, expected once")
    features, output = captured[0]
    if isinstance(head, nn.Conv2d):
        return features.flatten(2).mean(2), logits
    if features.ndim <= 2:
        return features, logits
    for turned in (False, True):  # samples first, or positions
        rows, read = ((each.transpose(0, 1) if turned else each).flatten(1, -2) for each in (features, output))
        if read[:, 0].shape == logits.shape and bool((taken := (read == logits[:, None]).all(2)).any(1).all()):
            return rows[torch.arange(len(rows), device=rows.device), taken.int().argmax(1)], logits
        if read[:, 0].shape == logits.shape and torch.allclose(read.mean(1), logits, rtol=1e-2, atol=1e-4):
            return rows.mean(1), logits
    return features.flatten(1, -2).mean(1), logits


class Run(NamedTuple):
    """What one network answers: penultimate features ``[B, F]``, F = 0 where not wanted, and logits ``[B, C]``."""

    features: Tensor
    logits: Tensor


def run_network(network: nn.Module, inputs: Batch, features: bool) -> Run:
    """Run a network once on a copy of the inputs, with its penultimate features if they are wanted."""
    inputs = map_tensors(torch.clone, inputs)
    with explained_inputs(network, lambda: inputs):
        found, logits = features_and_logits(network, inputs) if features else (None, network(inputs))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"found {shape} of {type(network).__name__}, expected logits [B, C]; give forward=…")
    return Run(full_precision(logits[:, :0] if found is None else found), full_precision(logits))


def full_precision(values: Tensor) -> Tensor:
    """Return values that autocast left in 16 bits as float32, in which answers are compared, and others as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


# How far logits of a type may be from the head's, in the size of the sum's terms: four times the type's precision, for
# float32 that of TF32, in which GPUs compute it. Float64 has no such short cut; its room is for long sums.
_TOLERANCES = {torch.float64: 2.0**-30, torch.float32: 2.0**-8, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}


@torch.no_grad()
def check_head(network: nn.Module, features: Tensor, logits: Tensor) -> None:
    """Raise HeadError unless a network's logits are W φ + b, with (W, b) its head and φ the head's input.

    A temperature, a softmax or a nonlinearity after the head breaks what methods that fit a head assume, and so does a
    head that is neither a Linear nor a 1×1 Conv2d layer. Features ``[B, F]`` and logits ``[B, C]`` are those of
    `features_and_logits`. Every logit is compared, in float64, in units of |Wφ + b| + √(Σ_k (W_k φ_k)² + b²), in which
    rounding errors grow whatever cancels. Raises NumericalError where an output is not finite.
    """
    for what, outputs in (("logits", logits), ("head's inputs", features)):
        if not bool(torch.isfinite(outputs).all()):
            told = f"the {what} of {type(network).__name__} hold a NaN or an infinity"
            raise NumericalError(f"{told}, expected finite ones; check the inputs and the network")
    name = head_name(network)
    head = network.get_submodule(name)
    found = ""
    if isinstance(head, nn.Linear | nn.Conv2d):
        weight, inputs = double(head.weight.flatten(1)), double(features)
        bias = weight.new_zeros(len(weight)) if head.bias is None else double(head.bias)
        if inputs.shape[1:] != weight.shape[1:] or logits.shape != (len(inputs), len(weight)):
            found = f" (found logits {list(logits.shape)} and inputs {list(inputs.shape)} for {list(weight.shape)})"
        else:
            read = F.linear(inputs, weight, bias)
            size = read.abs() + F.linear(inputs.square(), weight.square(), bias.square()).sqrt()
            types = {features.dtype, logits.dtype, head.weight.dtype}
            if torch.float32 in types and multiplies_in_bfloat16():
                types.add(torch.bfloat16)
            difference = (double(logits) - read).abs()
            if bool((difference <= max(_TOLERANCES[each] for each in types) * size).all()):
                return
            found = f" (found a difference of {float(difference.max()):.3g})"
    told = f"the logits of {type(network).__name__} are not its head '{name}' ({type(head).__name__}) of its input"
    advice = "name the layer that gives the logits in an attribute 'head_name', or leave out the method or decoder"
    raise HeadError(f"{told}{found}; {advice} that reads it")


_FEW = 8  # samples that tell whether logits are the head's of the features


@torch.no_grad()
def linear_heads(networks: Sequence[nn.Module], inputs: Batch | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return every network's head as its weight ``[C, F]`` and bias ``[C]``, padded with zeros to the largest C.

    The networks, in eval mode, are checked by `check_head` on the first few of the inputs; without any, the layers are.
    """
    heads = []
    for network in networks:
        head = network.get_submodule(head_name(network))
        if inputs is not None:
            features, logits = features_and_logits(network, take(inputs, slice(0, _FEW)))
        else:
            shape = head.weight.flatten(1).shape if isinstance(head, nn.Linear | nn.Conv2d) else (0, 0)
            features, logits = (torch.zeros(0, size, device=device_of(network)) for size in shape[::-1])
        check_head(network, features, logits)
        assert isinstance(head, nn.Linear | nn.Conv2d)
        weight = head.weight.detach().flatten(1)
        heads.append((weight, weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach()))
    width = max(len(bias) for _, bias in heads)
    return [(F.pad(w, (0, 0, 0, width - len(b))), F.pad(b, (0, width - len(b)))) for w, b in heads]
