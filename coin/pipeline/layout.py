"""The paths of an experiment's files; see `coin.reporting` for the contents of the results."""

from pathlib import Path

from coin.reporting.extras import EXAMPLES_NPZ, LAYERS_CSV, PROMISE_CSV, RISK_CSV, RISK_NPZ
from coin.reporting.results import CONFUSION_NPZ, RESULTS_CSV, RESULTS_JSON
from coin.reporting.summary import SUMMARY_CSV

LAUNCH_YAML = "launch.yaml"


class SeedLayout:
    """The files of one seed, in ``runs/NAME/seed-K``; ``logs`` has the logs of all steps but the experts' training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"  # with which ``coin run`` repeats the seed
        self.launch = folder / LAUNCH_YAML  # the same, for steps in processes of their own
        self.code = folder / "code.json"  # that the seed has chosen
        self.coded = folder / "coded"
        self.replicas = folder / "replicas"
        self.logs = folder / "logs"
        self.results = folder / RESULTS_CSV
        self.results_json = folder / RESULTS_JSON
        self.confusions = folder / CONFUSION_NPZ
        self.examples = folder / EXAMPLES_NPZ
        self.layers = folder / LAYERS_CSV
        self.risk = folder / RISK_CSV
        self.risk_samples = folder / RISK_NPZ
        self.promise = folder / PROMISE_CSV

    def expert(self, task: str) -> Path:
        """Return the file of a task's expert; its checkpoints and logs are in the same folder."""
        return self.folder / "experts" / task / "expert.safetensors"


class ExperimentLayout:
    """The files of an experiment, in ``runs/NAME``; ``base`` holds the shared initialisation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "base"
        self.pretrained = self.base / "base.safetensors"
        self.logs = folder / "logs"
        self.submitit = folder / "submitit"
        self.summary = folder / SUMMARY_CSV

    def initial(self, num_classes: int) -> Path:
        """Return the file of the shared initialisation with this number of outputs."""
        return self.base / f"initial-{num_classes}.safetensors"

    def seed(self, seed: int) -> SeedLayout:
        """Return the files of a seed."""
        return SeedLayout(self.folder / f"seed-{seed}")
