"""The code and its decoders: pure functions of outputs."""

from coin.coding.answers import Answers
from coin.coding.choice import choose_code, decoded_error_bound, simplex_codes
from coin.coding.code import Code, check_erasure
from coin.coding.decoder import Decoder
from coin.coding.decoder_config import DecoderConfig, DecoderKind, FeatureChoice, FittedOn, distinct_decoders
from coin.coding.decoders import make_decoder
from coin.coding.linear_decoder import LinearDecoder, decode_linear
from coin.coding.projection import Projection, ProjectionKind, fit_projection, project_answers
from coin.coding.ready import convex, uniform
from coin.coding.ridge import RidgeFit, fit_ridge
from coin.coding.ridge_decoder import FeatureRidgeDecoder, RidgeDecoder

__all__ = [
    "Answers",
    "Code",
    "Decoder",
    "DecoderConfig",
    "DecoderKind",
    "FeatureChoice",
    "FeatureRidgeDecoder",
    "FittedOn",
    "LinearDecoder",
    "Projection",
    "ProjectionKind",
    "RidgeDecoder",
    "RidgeFit",
    "check_erasure",
    "choose_code",
    "convex",
    "decode_linear",
    "decoded_error_bound",
    "distinct_decoders",
    "fit_projection",
    "fit_ridge",
    "make_decoder",
    "project_answers",
    "simplex_codes",
    "uniform",
]
