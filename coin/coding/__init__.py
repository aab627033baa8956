"""The code and its decoders: pure functions of outputs."""

from coin.coding.answers import Answers
from coin.coding.choice import choose_code, simplex_codes
from coin.coding.code import Code, check_erasure
from coin.coding.decoders import (
    Decoder,
    DecoderKind,
    FeatureRidgeDecoder,
    LinearDecoder,
    RidgeDecoder,
    decode_linear,
    make_decoder,
)
from coin.coding.projection import Projection, ProjectionKind, fit_projection, project_answers
from coin.coding.ready import convex, uniform
from coin.coding.ridge import RidgeFit, fit_ridge

__all__ = [
    "Answers",
    "Code",
    "Decoder",
    "DecoderKind",
    "FeatureRidgeDecoder",
    "LinearDecoder",
    "Projection",
    "ProjectionKind",
    "RidgeDecoder",
    "RidgeFit",
    "check_erasure",
    "choose_code",
    "convex",
    "decode_linear",
    "fit_projection",
    "fit_ridge",
    "make_decoder",
    "project_answers",
    "simplex_codes",
    "uniform",
]
