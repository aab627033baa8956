"""The steps of an experiment, files in and files out: what ``coin X`` and ``coin run`` both call."""
