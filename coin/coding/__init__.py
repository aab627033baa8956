"""The code and its decoders: pure functions of outputs."""

from typing import TYPE_CHECKING

from coin.core.lazy import importing

if TYPE_CHECKING:
    from coin.coding.answers import Answers
    from coin.coding.code import Code, check_erasure, decode_linear
    from coin.coding.decoder import Decoder, FeatureCache
    from coin.coding.decoder_config import DecoderConfig, DecoderKind, distinct_decoders
    from coin.coding.decoders import ExpertHeadDecoder, Head, LinearDecoder, kept_bytes, make_decoder
    from coin.coding.parity import fault_score, parity_residual, parity_significance
    from coin.coding.promise import Promise, promised_risk
    from coin.coding.ready import choose_code, convex, decoded_error_bound, simplex_codes, uniform
    from coin.coding.ridge import fit_ridge
    from coin.coding.risk import decoding_risk

__all__ = [
    "Answers",
    "Code",
    "Decoder",
    "DecoderConfig",
    "DecoderKind",
    "ExpertHeadDecoder",
    "FeatureCache",
    "Head",
    "LinearDecoder",
    "Promise",
    "check_erasure",
    "choose_code",
    "convex",
    "decode_linear",
    "decoded_error_bound",
    "decoding_risk",
    "distinct_decoders",
    "fault_score",
    "fit_ridge",
    "kept_bytes",
    "make_decoder",
    "parity_residual",
    "parity_significance",
    "promised_risk",
    "simplex_codes",
    "uniform",
]

__getattr__ = importing(
    __name__,
    ["answers", "code", "decoder", "decoder_config", "decoders", "parity", "promise", "ready", "ridge", "risk"],
)
