"""The steps of an experiment, in their order, each skipped where nothing that goes into it has changed."""
