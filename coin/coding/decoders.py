"""A decoder by its kind and options."""

from collections.abc import Sequence

from coin.coding.code import Code
from coin.coding.decoder import Decoder
from coin.coding.decoder_config import DecoderConfig, DecoderKind
from coin.coding.linear_decoder import LinearDecoder
from coin.coding.ridge_decoder import FeatureRidgeDecoder, RidgeDecoder
from coin.errors import ConfigurationError, DecodingError


def make_decoder(kind: DecoderKind | str | DecoderConfig, code: Code, erased: Sequence[int]) -> Decoder:
    """Return an unfitted decoder.

    The calibrated kinds read only the number of experts from the code, so they serve ``method: none`` (no coded
    answers) as they are.

    Args:
        kind: The decoder: a kind with its default options, or a configuration.
        code: The code.
        erased: Indices of the lost experts.

    Raises:
        DecodingError: There is no such kind, or it cannot decode the erasure.
    """
    try:
        config = DecoderConfig.of(kind)
    except ConfigurationError as error:
        raise DecodingError(str(error)) from error
    if config.kind is DecoderKind.linear:
        return LinearDecoder(code, erased)
    decoder = {DecoderKind.ridge: RidgeDecoder, DecoderKind.feature_ridge: FeatureRidgeDecoder}[config.kind]
    return decoder(code.num_experts, erased, config)
