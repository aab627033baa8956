"""A fitted decoder as named tensors and plain values, and back."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from coin.coding.code import Code
from coin.coding.decoder import Decoder
from coin.coding.decoder_config import DecoderConfig
from coin.coding.decoders import HEAD_PARTS, ExpertHeadDecoder, make_decoder
from coin.coding.promise import Promise
from coin.coding.ridge import Projection, RidgeFit
from coin.coding.ridge_decoder import RidgeDecoder
from coin.errors import StateError

Map = TypeVar("Map", RidgeFit, Projection)
_ADVICE = "fit the decoder anew"


def decoder_state(decoder: Decoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a decoder's state, for `restore_decoder`: tensors by name, and its other values as JSON types."""
    moments = {} if decoder.moments is None else {"moments": decoder.moments}
    rest = {"decoder": decoder.config.name, "erased": list(decoder.erased), "num_experts": decoder.num_experts}
    if decoder.promises:
        rest["promises"] = {str(expert): asdict(each) for expert, each in decoder.promises.items()}
    if isinstance(decoder, RidgeDecoder):
        rest["widths"] = decoder.widths
    return moments | decoder.tensors, rest


def restore_decoder(state: Mapping[str, Tensor], rest: Mapping[str, Any], code: Code) -> Decoder:
    """Rebuild a decoder from its `decoder_state` and its code.

    Raises StateError where a tensor or value is missing, superfluous, or does not fit the code or the others, and
    DecodingError where there is no such decoder of the code.
    """
    try:
        # In memory of its own, aligned as a computed tensor is: a product's last bit may depend on that.
        state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        decoder = make_decoder(DecoderConfig.named(rest["decoder"]), code, rest["erased"])
        experts = int(rest["num_experts"])
        if isinstance(decoder, RidgeDecoder):
            decoder.widths = [list(map(int, widths)) for widths in rest["widths"]]
            decoder.fitted = _maps(RidgeFit, "fitted", state)
            decoder.projections = _maps(Projection, "projections", state)
        elif isinstance(decoder, ExpertHeadDecoder) and any(name.startswith("heads.") for name in state):
            weights, biases = ([state[f"heads.{e}.{part}"] for e in decoder.erased] for part in HEAD_PARTS)
            decoder.heads = dict(zip(decoder.erased, zip(weights, biases, strict=True), strict=True))
        decoder.promises = {int(expert): Promise(**each) for expert, each in rest.get("promises", {}).items()}
        decoder.moments = state.get("moments")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(
            f"found a decoder's state that is not whole ({error}), expected all of it; {_ADVICE}"
        ) from None
    if experts != code.num_experts:
        raise StateError(f"found a decoder of {experts} experts, expected {code.num_experts}; {_ADVICE}")
    if superfluous := sorted(state.keys() - decoder_state(decoder)[0].keys()):
        raise StateError(f"found '{superfluous[0]}' in a decoder's state, expected no such tensor; {_ADVICE}")
    for tensor, expected in _shapes(decoder):
        if tensor.shape != expected:
            raise StateError(f"found {list(tensor.shape)} in a decoder's state, expected {list(expected)}; {_ADVICE}")
    return decoder


def decoders_state(decoders: Sequence[Decoder]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the states of several decoders for one file; names begin with the decoder's index and a slash."""
    told = [decoder_state(decoder) for decoder in decoders]
    state = {f"{place}/{name}": tensor for place, (own, _) in enumerate(told) for name, tensor in own.items()}
    return state, [rest for _, rest in told]


def restore_decoders(state: Mapping[str, Tensor], rests: Sequence[Mapping[str, Any]], code: Code) -> list[Decoder]:
    """Return the decoders that `decoders_state` has told of; raises as `restore_decoder`."""
    own: list[dict[str, Tensor]] = [{} for _ in rests]
    for name, tensor in state.items():
        place, _, rest = name.partition("/")
        if not (place.isdecimal() and int(place) < len(own)):
            raise StateError(f"found '{name}' in the state of {len(own)} decoders, expected no such tensor; {_ADVICE}")
        own[int(place)][rest] = tensor
    return [restore_decoder(each, rest, code) for each, rest in zip(own, rests, strict=True)]


def _maps(kind: type[Map], group: str, state: Mapping[str, Tensor]) -> list[Map]:
    count = len({name.split(".")[1] for name in state if name.startswith(f"{group}.")})
    return [kind(*(state[f"{group}.{place}.{name}"] for name in kind.kept)) for place in range(count)]


def _shapes(decoder: Decoder) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Yield tensors with the shapes that fit what arrives, reduced by the projections, and the lost logits."""
    if isinstance(decoder, ExpertHeadDecoder):
        for weight, bias in decoder.heads.values():
            yield from ((weight, (len(bias), weight.shape[-1])), (bias, (len(bias),)))
    if not isinstance(decoder, RidgeDecoder):
        return
    logits, *networks = [sum(widths) for widths in decoder.widths] or [0]
    for width, projection in zip(networks, decoder.projections, strict=False):
        yield from ((projection.directions, (width, projection.directions.shape[1])), (projection.mean, (width,)))
    inputs = logits + sum([projection.directions.shape[1] for projection in decoder.projections] or networks)
    outputs = 0 if decoder.moments is None else decoder.moments.shape[-1]
    groups = len(decoder.erased) // max(len(decoder.fitted), 1)
    for fit in decoder.fitted:
        yield from ((fit.coefficients, (inputs, groups * outputs)), (fit.input_mean, (inputs,)))
        yield fit.target_mean, (groups * outputs,)
    if decoder.fitted:
        assert decoder.moments is not None
        yield decoder.moments, (len(decoder.erased), outputs, outputs)
