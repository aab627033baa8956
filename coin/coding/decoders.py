"""The decoders by kind: the linear one and the experts' own heads, and `make_decoder` for these and the ridge ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from coin.coding.answers import Answers
from coin.coding.code import Code, check_decodable, decode_linear
from coin.coding.decoder import Decoder
from coin.coding.decoder_config import DecoderKind
from coin.coding.ridge_decoder import RidgeDecoder
from coin.core.choices import parse_enum
from coin.core.devices import double

Head = tuple[Tensor, Tensor]
"""A classifier head's weight ``[C, F]`` and bias ``[C]``, padded with zeros to the largest class count."""
Heads = Sequence[Head] | Mapping[int, Head]
"""The heads of all experts, or of some by expert."""


class LinearDecoder(Decoder):
    """The paper's decoder, by `decode_linear` over all rows of the code; exact when the coded outputs are.

    Raises DecodingError where more experts are lost than the code can decode.
    """

    needs_fit = False

    def __init__(self, code: Code, erased: Sequence[int]) -> None:
        super().__init__(code.num_experts, erased, DecoderKind.linear)
        check_decodable(code.matrix, self.erased)
        self.code = code

    def _decode(self, answers: Answers) -> Tensor:
        survivors = answers.experts[list(self.survivors)]
        return decode_linear(self.code.matrix, answers.coded, survivors, self.erased)


class ExpertHeadDecoder(Decoder):
    """The lost experts' own heads on the penultimate features of the coded model with the largest β for each.

    Exact where the coded model's features are the expert's. No other server is asked, so all experts may be lost.
    `decode` needs the `heads` of all experts, or of the lost ones by expert; the buffers are the lost ones' weights
    ``[ΣC_j, F]`` and biases ``[ΣC_j]``, one after another without their padding, and their class counts C_j.
    """

    needs_fit = False
    weight: Tensor
    bias: Tensor
    class_counts: Tensor

    def __init__(
        self,
        code: Code,
        erased: Sequence[int],
        heads: Heads | None = None,
    ) -> None:
        super().__init__(code.num_experts, erased, DecoderKind.expert_head)
        largest = code.matrix.argmax(0).tolist()
        self.row_of = {expert: largest[expert] for expert in self.erased}
        """Which coded model each lost expert is read from, the first of equals."""
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)
        self.register_buffer("class_counts", None)
        if heads:
            own = [_without_padding(*heads[expert]) for expert in self.erased]
            self.weight = torch.cat([weight for weight, _ in own])
            self.bias = torch.cat([bias for _, bias in own])
            self.class_counts = torch.tensor([len(bias) for _, bias in own])

    def rows(self, num_coded: int) -> tuple[int, ...]:
        """Return the coded models that the lost experts are read from."""
        return tuple(sorted(set(self.row_of.values())))

    def _decode(self, answers: Answers) -> Tensor:
        assert answers.coded_features is not None
        counts = self.class_counts.tolist()
        heads = zip(torch.split(self.weight, counts), torch.split(self.bias, counts), strict=True)
        width = max(answers.coded.shape[2], *counts)
        decoded = []
        for row, (weight, bias) in zip(self.row_of.values(), heads, strict=True):
            features = double(answers.coded_features[row])  # [B, F]
            if features.shape[1] == 0:  # the coded model is silent
                logits = features.new_full((len(features), len(bias)), torch.nan)
            else:
                logits = features @ weight.to(features).T + bias.to(features)
            decoded.append(pad(logits, (0, width - len(bias))))
        return torch.stack(decoded).to(answers.experts)


def _without_padding(weight: Tensor, bias: Tensor) -> Head:
    """Return a head without its last rows that are zero, whose logits are as zero as padding is."""
    is_used = weight.any(1) | (bias != 0)
    last = int(is_used.nonzero().max()) if is_used.any() else 0
    return weight[: last + 1], bias[: last + 1]


def make_decoder(
    kind: DecoderKind | str,
    code: Code,
    erased: Sequence[int],
    heads: Heads | None = None,
) -> Decoder:
    """Return an unfitted decoder of a kind.

    The calibrated kinds read only the number of experts from the code, and serve without coded answers too. For
    expert_head it takes the heads of all experts, or of the lost ones by expert (`coin.networks.linear_heads`). Raises
    ConfigurationError where there is no such kind, DecodingError where it cannot decode the erasure.

    >>> answers = coin.Answers(torch.ones(3, 1, 2), coded=2 * torch.ones(1, 1, 2))
    >>> coin.make_decoder("linear", code, erased=[0]).decode(answers)
    tensor([[[4., 4.]]])
    """
    kind = parse_enum(DecoderKind, "decoder", kind)
    if kind is DecoderKind.linear:
        return LinearDecoder(code, erased)
    if kind is DecoderKind.expert_head:
        return ExpertHeadDecoder(code, erased, heads)
    return RidgeDecoder(code.num_experts, erased, kind)
