"""The commands: modules whose ``main`` takes the arguments; `coin.cli` imports them on use."""

COMMANDS = {
    "run": "Run a whole experiment, resumably.",
    "fit": "Fine-tune one expert, or pretrain a base.",
    "fisher": "Compute the statistics of an existing checkpoint.",
    "merge": "Merge experts into coded models.",
    "compress": "Compress a network to its delta from the shared initialisation, in few bits.",
    "export": "Write one expert's plain network, or one of Hugging Face's as a folder that transformers loads.",
    "evaluate": "Measure how well lost experts are decoded.",
    "report": "Write the report of a finished experiment.",
    "choose": "Say which stand-in to keep, from an experiment's results and limits of accuracy and memory.",
    "serve": "Serve an experiment's experts and coded models over HTTP, on Ray Serve.",
    "dashboard": "Make a W&B workspace of a project's experiments, online.",
    "validate": "Measure an expert on the validation split.",
    "test": "Measure an expert on the test set.",
    "predict": "Predict with an expert.",
}
"""The commands and what they do. Those of the Trainer are LightningCLI's, the others functions."""

FUNCTIONS = {  # commands that only pass their options to a function
    "merge": "coin.commands.merge.merge",
    "compress": "coin.commands.compress.compress_network",
    "export": "coin.commands.export.export",
    "serve": "coin.commands.serve.serve",
    "report": "coin.reporting.report.write_report",
    "dashboard": "coin.tracking.dashboard.dashboard",
}
ON_TRAINER = ("fit", "validate", "test", "predict", "fisher", "evaluate")
