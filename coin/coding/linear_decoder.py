"""The paper's decoder: the code's equations, solved for the lost outputs."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from coin.coding.answers import Answers
from coin.coding.code import MAX_AMPLIFICATION, Code, check_erasure
from coin.coding.decoder import Decoder
from coin.coding.decoder_config import DecoderKind
from coin.errors import DecodingError


def decode_linear(matrix: Tensor, coded: Tensor, survivors: Tensor, erased: Sequence[int]) -> Tensor:
    """Solve the code's equations for the lost outputs, in the least-squares sense.

    f̂_E = B_E⁺ (f_c − B_S f_S) with B_E, B_S the columns of the lost and the surviving experts. One row and one lost
    expert j: (f_c − Σ_{i≠j} β_i f_i)/β_j, the paper's decoder (arXiv 2409.01420, section II).

    Args:
        matrix: Rows of the code whose coded models answered ``[R, N]``.
        coded: Their outputs ``[R, B, C]``.
        survivors: Outputs of the experts not in `erased`, in ascending order ``[N − |erased|, B, C]``.
        erased: Indices of the lost experts.

    Returns:
        ``[|erased|, B, C]``, in the type of `coded`.

    Raises:
        DecodingError: More experts are lost than coded models answered, or the columns of the lost experts are
            linearly dependent.
    """
    erased = check_erasure(erased, matrix.shape[1])
    present = [expert for expert in range(matrix.shape[1]) if expert not in erased]
    if len(erased) > matrix.shape[0]:
        raise DecodingError(
            f"{len(erased)} experts are lost but {matrix.shape[0]} coded models answered, expected at least as many; "
            "add rows to the code or use a calibrated decoder"
        )
    weights = matrix.to(torch.float64)
    columns = weights[:, list(erased)]
    smallest = float(torch.linalg.svdvals(columns)[-1])
    if smallest * MAX_AMPLIFICATION < 1:
        raise DecodingError(
            f"the code's columns for the lost experts {list(erased)} are linearly dependent (smallest singular value "
            f"{smallest:.3g}), expected at least {1 / MAX_AMPLIFICATION:.0e}; choose another code"
        )
    inverse = torch.linalg.pinv(columns)
    # One matrix for both parts, made in float64 and rounded once.
    from_survivors = -(inverse @ weights[:, present])
    decoded: Tensor = torch.tensordot(inverse.to(coded), coded, dims=1)
    if present:
        decoded = decoded + torch.tensordot(from_survivors.to(coded), survivors.to(coded), dims=1)
    return decoded


class LinearDecoder(Decoder):
    """The paper's decoder, by `decode_linear` over all rows of the code; exact when the coded outputs are.

    Args:
        code: The code.
        erased: Indices of the lost experts, at most R.

    Raises:
        DecodingError: The erasure is past the budget, or the code is singular on it.
    """

    kind = DecoderKind.linear

    def __init__(self, code: Code, erased: Sequence[int]) -> None:
        super().__init__(code.num_experts, erased)
        if len(self.erased) > code.max_erasures:
            raise DecodingError(
                f"{len(self.erased)} experts are lost, the code decodes at most {code.max_erasures}; "
                "add rows to the code or use a calibrated decoder"
            )
        self.code = code

    @property
    def needs_fit(self) -> bool:
        """False: the code says it all."""
        return False

    def fit(self, calibration: Answers) -> Self:
        """Do nothing: the code says it all."""
        return self

    def samples_read(self, calibration: Answers) -> int:
        """Return 0: the code says it all."""
        return 0

    def decode(self, answers: Answers) -> Tensor:
        """Return the lost experts' logits; see `decode_linear`."""
        self._check(answers)
        if answers.num_coded != self.code.num_coded:
            raise DecodingError(
                f"found answers of {answers.num_coded} coded models, the code has {self.code.num_coded}; give all of "
                "them, or a code of those rows"
            )
        survivors = answers.experts[list(self.survivors)]
        return decode_linear(self.code.matrix.to(answers.coded.device), answers.coded, survivors, self.erased)
