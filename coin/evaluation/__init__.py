"""Evaluation: coded systems from files, replicas, scores and example images."""
