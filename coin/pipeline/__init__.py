"""Whole experiments: every step from images to results; `coin.pipeline.experiment` has the options."""
