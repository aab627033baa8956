"""Evaluation: coded systems from files, replicas and scores."""
