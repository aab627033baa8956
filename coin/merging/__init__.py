"""Merge methods: experts and statistics of their calibration data in, coded models out."""

from coin.merging.average import Average as Average, Base as Base, HeadFit as HeadFit
from coin.merging.body import fit_adapters as fit_adapters
from coin.merging.closed_form import MergeMethod as MergeMethod
from coin.merging.coin import Coin as Coin
from coin.merging.experts import Experts as Experts
from coin.merging.merge_networks import Merged as Merged, merge_networks as merge_networks
from coin.merging.method import CodedModel as CodedModel, Method as Method
from coin.merging.peft import extract_lora as extract_lora
from coin.merging.refit import Refit as Refit
from coin.merging.regmean import RegMean as RegMean, RegMeanLayers as RegMeanLayers
from coin.merging.user_method import UserMethod as UserMethod
