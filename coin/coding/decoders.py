"""The decoders by kind: the linear one and the experts' own heads, and `make_decoder` for these and the ridge ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from coin.coding.answers import Answers
from coin.coding.code import Code, decode_linear
from coin.coding.decoder import Decoder
from coin.coding.decoder_config import DecoderConfig, DecoderKind
from coin.coding.ridge_decoder import RidgeDecoder
from coin.core.devices import double
from coin.errors import ConfigurationError, DecodingError

Head = tuple[Tensor, Tensor]
"""A classifier head's weight ``[C, F]`` and bias ``[C]``, padded with zeros to the largest class count."""


class LinearDecoder(Decoder):
    """The paper's decoder, by `decode_linear` over all rows of the code; exact when the coded outputs are."""

    needs_fit = False

    def __init__(self, code: Code, erased: Sequence[int]) -> None:
        super().__init__(code.num_experts, erased, DecoderConfig(DecoderKind.linear))
        if len(self.erased) > code.max_erasures:
            told = f"{len(self.erased)} experts are lost, the code decodes at most {code.max_erasures}"
            raise DecodingError(f"{told}; add rows to the code or use a calibrated decoder")
        self.code = code

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits; see `decode_linear`."""
        self._check(answers)
        if answers.num_coded != self.code.num_coded:
            found = f"found answers of {answers.num_coded} coded models, the code has {self.code.num_coded}"
            raise DecodingError(f"{found}; give all of them, or a code of those rows")
        survivors = answers.experts[list(self.survivors)]
        return decode_linear(self.code.matrix, answers.coded, survivors, self.erased)


class ExpertHeadDecoder(Decoder):
    """The lost experts' own heads on the penultimate features of the coded model with the largest β for each.

    Exact where the coded model's features are the expert's. No other server is asked, so all experts may be lost.
    `decode` needs the `heads` of all experts, or of the lost ones by expert; the buffers are the lost ones' weights
    ``[|erased|, C, F]`` and biases ``[|erased|, C]``, padded with zeros to the largest class count.
    """

    needs_fit = False
    weight: Tensor
    bias: Tensor

    def __init__(
        self, code: Code, erased: Sequence[int], heads: Sequence[Head] | Mapping[int, Head] | None = None
    ) -> None:
        super().__init__(code.num_experts, erased, DecoderConfig(DecoderKind.expert_head))
        self.row_of = {expert: int(code.matrix[:, expert].argmax()) for expert in self.erased}
        """Which coded model each lost expert is read from, the first of equals."""
        own = list(zip(*(heads[expert] for expert in self.erased), strict=True)) if heads else (None, None)
        for name, tensors in zip(("weight", "bias"), own, strict=True):
            self.register_buffer(name, None if tensors is None else pad_sequence(list(tensors), batch_first=True))

    def rows(self, num_coded: int) -> tuple[int, ...]:
        """Return the coded models that the lost experts are read from."""
        return tuple(sorted(set(self.row_of.values())))

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits; see the class."""
        self._check(answers)
        if next(self.buffers(), None) is None:
            raise DecodingError(f"the {self.config.name} decoder has no heads; make it with the lost experts' heads")
        if answers.coded_features is None:
            raise self._without_features()
        rows, width = [self.row_of[expert] for expert in self.erased], self.weight.shape[2]
        widths = dict(enumerate(feature.shape[1] for feature in answers.coded_features))
        if wrong := [row for row in rows if widths.get(row) not in (0, width)]:
            told = f"found {widths.get(wrong[0], 'no')} features of coded model {wrong[0]}, a lost expert's head reads"
            raise DecodingError(f"{told} {width}; keep the places of silent models, or use another decoder")
        # A coded model that is silent has none: what is read from it is no number.
        every = [pad(each, (0, width - each.shape[1]), value=torch.nan) for each in answers.coded_features]
        features = double(torch.stack([every[row] for row in rows]))
        logits = features @ self.weight.to(features).mT + self.bias.to(features)[:, None]
        return pad(logits, (0, max(0, answers.coded.shape[2] - logits.shape[2]))).to(answers.experts)


def make_decoder(
    kind: DecoderKind | str | DecoderConfig,
    code: Code,
    erased: Sequence[int],
    heads: Sequence[Head] | Mapping[int, Head] | None = None,
) -> Decoder:
    """Return an unfitted decoder of a kind with its default options, or of a configuration.

    The calibrated kinds read only the number of experts from the code, and serve without coded answers too. For
    expert_head it takes the heads of all experts, or of the lost ones by expert (`coin.networks.linear_heads`). Raises
    DecodingError where there is no such kind, or it cannot decode the erasure.

    >>> answers = coin.Answers(torch.ones(3, 1, 2), coded=2 * torch.ones(1, 1, 2))
    >>> coin.make_decoder("linear", code, erased=[0]).decode(answers)
    tensor([[[4., 4.]]])
    """
    try:
        config = DecoderConfig.of(kind)
    except ConfigurationError as error:
        raise DecodingError(str(error)) from error
    if config.kind is DecoderKind.linear:
        return LinearDecoder(code, erased)
    if config.kind is DecoderKind.expert_head:
        return ExpertHeadDecoder(code, erased, heads)
    return RidgeDecoder(code.num_experts, erased, config)
