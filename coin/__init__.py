"""Erasure-coded neural networks."""
