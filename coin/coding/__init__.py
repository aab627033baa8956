"""The code and its decoders: pure functions of outputs."""

from coin.coding.answers import Answers as Answers
from coin.coding.code import Code as Code, decode_linear as decode_linear
from coin.coding.decoder import Decoder as Decoder, make_decoder as make_decoder
from coin.coding.decoder_config import (
    DecoderKind as DecoderKind,
    distinct_decoders as distinct_decoders,
)
from coin.coding.promise import (
    Promise as Promise,
    answer_score as answer_score,
    promised_threshold as promised_threshold,
)
from coin.coding.ready import convex as convex, uniform as uniform
from coin.coding.ridge import fit_ridge as fit_ridge
