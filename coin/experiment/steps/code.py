"""The step that chooses a seed's code, where the experiment leaves it to the seed."""

from coin.experiment.seed_run import CODE_JSON, SeedRun
from coin.experiment.store import step_key
from coin.processes import from_first
from coin.steps.code import write_choice


def choose_code(run: SeedRun) -> None:
    """Choose the code from calibration data, where the experiment does not give it."""
    if run.experiment.code is not None:
        return
    path = run.folder / CODE_JSON
    options = {"tasks": run.tasks, "calibration": run.experiment.calibration}
    key = step_key(options, list(run.experts.paths.values()), run.experts.sha256)
    if not run.steps.finished("code", key, [path], shared=True):
        from_first(lambda: write_choice(path, run.experts.networks, list(run.calibrations().values())))
        run.steps.finish("code", key, [path])
    weights = ", ".join(f"{weight:.3g}" for weight in run.code.code.matrix[0].tolist())
    run.say(f"code: chosen weights {weights}")
