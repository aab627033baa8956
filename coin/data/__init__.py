"""Tasks as LightningDataModules, one file per source, and the calibration data drawn from them."""

from coin.data.digits import Digits
from coin.data.glyphs import Glyphs
from coin.data.mnist5k import MNIST5k
