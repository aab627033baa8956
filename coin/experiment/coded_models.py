"""The steps after the experts: code, statistics, coded models, their comparison layer by layer, the evaluation."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from coin.core.processes import on_rank_zero
from coin.core.progress import tracked
from coin.data import TaskData
from coin.experiment.jobs import Job, by_stem, job
from coin.experiment.seed_run import SeedRun
from coin.experiment.store import step_key
from coin.merging import Method
from coin.merging.experts import parameters_of
from coin.modules import DecodingEvaluator
from coin.networks import Compression, load_network
from coin.reporting.extras import write_layers
from coin.reporting.layers import fisher_shares, relative_distances
from coin.reporting.results import COLUMNS, read_results, requested_policy
from coin.reporting.summary import summarise, variant_names
from coin.reporting.wandb_evaluation import METHOD_TAG, best, log_method
from coin.reporting.wandb_settings import in_sweep, logging_only
from coin.statistics import Precision
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind
from coin.steps.code import write_choice
from coin.steps.compress import compress_file
from coin.steps.distill import Training
from coin.steps.expert_files import StatisticPaths, StoredExperts
from coin.steps.merge import coded_name, make_coded_models
from coin.steps.statistics import estimate_over_tasks
from coin.steps.trainer import make_trainer


def choose_code(run: SeedRun) -> None:
    """Choose the code from calibration data, where the experiment does not give it."""
    if run.experiment.code is not None:
        return
    path = run.layout.code
    key = step_key(
        {"tasks": run.tasks, "calibration": run.experiment.calibration.merging}, list(run.experts.paths.values())
    )

    def choose() -> None:
        write_choice(path, run.experts.networks, list(run.calibrations().values()))

    run.steps.once("code", key, [path], choose, shared=True)
    weights = ", ".join(f"{weight:.3g}" for weight in run.code.code.matrix[0].tolist())
    run.rank_zero_info(f"code: chosen weights {weights}")


def estimate(run: SeedRun, which: Statistic) -> None:
    """Compute one statistic for every expert whose file is missing or out of date."""
    calibration = run.experiment.calibration
    missing: dict[str, tuple[Path, str, dict[str, TaskData]]] = {}
    for task in run.tasks:
        path = run.statistic_path(which, task)
        tasks = run.tasks if which.data is DataChoice.pooled else {task: run.tasks[task]}
        options = {"tasks": tasks, "samples": calibration.samples_per_task, "batch_size": calibration.batch_size}
        if which.kind is not None:
            options |= {"kind": which.kind, "k": calibration.fisher_cotangents}
            if calibration.fisher_precision is not Precision.full:
                options["precision"] = calibration.fisher_precision
        key = step_key(options, [run.layout.expert(task)])
        if not run.steps.finished(path.stem, key, [path], shared=True):
            missing[task] = (path, key, tasks)
    if not missing:
        return
    run.rank_zero_info(f"{which} of {', '.join(missing)}")
    name = "-".join((str(which.name), *which.options.values()))
    own: dict[str, Any] = {"statistic": str(which.name), **which.options}
    with job(run.experiment, "fisher", name, run.seed, list(which.options.values()), **own) as work:
        work.use_artifacts("expert", {task: run.layout.expert(task) for task in missing})
        for task, (path, key, tasks) in missing.items():
            costs = estimate_over_tasks(
                make_trainer(run.folder, run.experiment.trainer),
                load_network(run.layout.expert(task)).network,
                run.data(tasks),
                calibration.options_of(which),
                path,
                weights=run.experts.fingerprints[task],
                task=task,
                data=str(which.data),
            )
            run.steps.finish(path.stem, key, [path])
            work.measures({f"{which.name}/{task}/{what}": cost for what, cost in costs.items()})
        if which.name is StatisticKind.fisher:  # Gram matrices are many times the size of the networks
            work.log_artifacts("statistics", by_stem(path for path, _, _ in missing.values()))


def merge(run: SeedRun, jobs: ExitStack) -> None:
    """Make every method's coded models; `jobs` keeps the methods' jobs open until the evaluation has their numbers."""
    for method in run.experiment.methods:
        name, paths, statistics = coded_name(method), run.coded_paths(method), run.statistics(method)
        key, outputs = _merge_key(run, method, statistics), run.coded_outputs(method)
        if run.steps.finished(f"coded-{name}", key, outputs):
            run.rank_zero_info(f"{name}: up to date")
            continue
        run.rank_zero_info(f"{name}: {'training' if method.is_trained else 'merging'}")
        work = run.method_jobs[name] = jobs.enter_context(_method_job(run, method))
        _tell_inputs(run, work, method, statistics)
        train = Training(run.data(run.tasks), run.layout.logs, run.seed, run.experiment.trainer, work.loggers)
        experts = StoredExperts(run.experts, statistics, run.calibrations(), run.initial, train)
        samples = run.experiment.calibration.samples_per_task
        make = partial(make_coded_models, method, run.code, experts, run.layout.coded, samples)
        make() if method.is_trained else on_rank_zero(make)
        work.log_artifacts("coded-model", by_stem(paths))
        run.steps.finish(f"coded-{name}", key, outputs)


def make_spares(run: SeedRun) -> None:
    """Compress every expert in each of the ways listed under the experiment's `spares`."""
    for compression in run.experiment.spares:
        paths, sources = run.spare_paths(compression), [*run.experts.paths.values(), run.initial]
        key = step_key({"compression": compression}, sources)

        def compress(compression: Compression = compression, paths: list[Path] = paths) -> None:
            run.rank_zero_info(f"spares of {compression.name}: compressing")
            for source, path in zip(run.experts.paths.values(), paths, strict=False):
                compress_file(source, path, run.initial, compression)

        run.steps.once(f"spares-{compression.name}", key, paths, compress, shared=True)


def _method_job(run: SeedRun, method: Method, *, again: bool = False) -> AbstractContextManager[Job]:
    own = {"method": method.label, "batchnorm": str(method.batchnorm)}
    tags = [METHOD_TAG, method.label]
    return job(run.experiment, "method", coded_name(method), run.seed, tags, again=again, **own)


def _merge_key(run: SeedRun, method: Method, statistics: StatisticPaths) -> str:
    options: dict[str, Any] = {
        "method": method,
        "code": run.code.code.matrix,
        "calibration": run.experiment.calibration.merging,
        "tasks": run.tasks,
        "seed": run.seed,
    }
    if run.experiment.code is None:
        options["code_passes"] = run.code.passes  # they are part of what the coded models cost
    if method.is_trained:
        options["trainer"] = run.experiment.trainer
    sources = [*run.experts.paths.values(), *(path for files in statistics.values() for path in files.values())]
    if method.reads_initial:
        sources.append(run.initial)
    return step_key(options, sources)


def _tell_inputs(run: SeedRun, work: Job, method: Method, statistics: StatisticPaths) -> None:
    """Tell W&B which files a method reads."""
    work.use_artifacts("expert", run.experts.paths)
    for which, files in statistics.items():
        work.use_artifacts("statistics", by_stem(files.values()), logged=which.name is StatisticKind.fisher)
    if method.reads_initial:
        work.use_artifacts("initialisation", by_stem([run.initial]))


def compare_layers(run: SeedRun) -> None:
    """Write ``layers.csv``, unless it is up to date."""
    methods = run.experiment.methods
    coded = {path: method for method in methods for path in run.coded_paths(method, compressed=False)}
    statistics = {path for method in methods for files in run.statistics(method).values() for path in files.values()}
    output = run.layout.layers
    if not coded:
        on_rank_zero(lambda: output.unlink(missing_ok=True))
        return
    key = step_key({}, [*run.experts.paths.values(), *coded, *sorted(statistics)])
    run.steps.once("layers", key, [output], lambda: write_layers(run.folder, _compared(run, coded)))


def _compared(run: SeedRun, coded: Mapping[Path, Method]) -> pd.DataFrame:
    """Return one row a coded model and layer: the layer's share of Fisher mass, its distance to the experts."""
    run.rank_zero_info("comparing the coded models layer by layer")
    experts = StoredExperts(run.experts).parameters
    fishers: dict[tuple[Any, ...], dict[str, float]] = {}  # methods share their statistics, and the rows of a code too
    rows: list[dict[str, Any]] = []
    for path, method in tracked(coded.items(), "layers"):
        file = load_network(path)
        made = file.provenance
        weights = made["code"][made["row"]]
        files = run.statistics(method)
        data = made.get("chosen", {}).get("fisher_data")
        shares: dict[str, float] = {}
        for which in files:
            if which.name is StatisticKind.fisher and which.data == data:
                key = (which, *weights)
                if key not in fishers:
                    fishers[key] = fisher_shares(StoredExperts(run.experts, files).statistic(which), weights)
                shares = fishers[key]
        distances = relative_distances(parameters_of(file.network), experts, weights)
        rows += [
            {
                "method": made["label"],
                "batchnorm": made["batchnorm"],
                "code_row": str(made["row"]),
                "layer": layer,
                "fisher_share": shares.get(layer),
                "distance": distance,
            }
            for layer, distance in distances.items()
        ]
    return pd.DataFrame(rows)


def evaluate(run: SeedRun) -> None:
    """Measure every method with every decoder, if an input has changed since the last evaluation."""
    experiment, layout = run.experiment, run.layout
    coded = [path for method in experiment.methods for path in run.coded_paths(method)]
    spares = [path for each in experiment.spares for path in run.spare_paths(each)[: len(run.tasks)]]
    shown = coded and experiment.network.reads == "images"
    outputs = [layout.results, layout.results_json, layout.confusions, layout.risk, layout.risk_samples]
    outputs += [layout.examples] if shown else []
    outputs += [layout.promise] if experiment.calibration.promise_samples else []
    options, code = experiment.config_dict(run.seed), run.code.code.matrix  # results.json says all of them
    key = step_key({**options, "code": code, "columns": COLUMNS}, [*run.experts.paths.values(), *coded, *spares])
    if run.steps.finished("evaluate", key, outputs):
        on_rank_zero(layout.results_json.touch)  # of seeds with different options, the latest run's count
        run.rank_zero_info("evaluation: up to date")
    else:
        run.rank_zero_info("evaluating every method with every decoder")
        model = DecodingEvaluator(
            experts={name: str(path) for name, path in run.experts.paths.items()},
            coded=[str(path) for path in coded],
            decoders=None if experiment.takes_all_decoders else list(experiment.decoders),
            code=code.tolist(),
            spares=[str(path) for path in spares],
            alpha=experiment.calibration.promise_alpha,
            confidence=experiment.calibration.promise_confidence,
        )
        with job(experiment, "evaluate", "evaluate", run.seed) as work:
            work.use_artifacts("expert", run.experts.paths)
            work.use_artifacts("coded-model", by_stem(coded))
            trainer = make_trainer(run.folder, experiment.trainer, logger=work.loggers)
            trainer.evaluate(model, run.data(run.tasks), str(run.folder), experiment.name, options)
            work.log_artifacts("results", {"rows": layout.results_json})
        run.steps.finish("evaluate", key, outputs)
    on_rank_zero(partial(_log_methods, run))


def _log_methods(run: SeedRun) -> None:
    """Write every method's results to its W&B run; the runs of methods that were skipped are written again in full."""
    key = step_key({}, [run.layout.results])
    logged = run.steps.finished("wandb-methods", key, [])
    if in_sweep() or (logged and not run.method_jobs):
        return
    with logging_only("the runs of the methods"):
        rows = read_results(run.folder)
        asked = rows["batchnorm"].map(requested_policy)
        top, whole = best(summarise(rows)).get("best_method"), True
        for method in run.experiment.methods:
            paths = by_stem(run.coded_paths(method))
            own = rows[(rows["method"] == method.label) & asked.isin(["", str(method.batchnorm)])]
            with ExitStack() as stack:
                work = run.method_jobs.pop(coded_name(method), None)
                if work is None and logged:
                    continue
                if work is None:
                    work = stack.enter_context(_method_job(run, method, again=True))
                    _tell_inputs(run, work, method, run.statistics(method))
                    work.repeat_curve(run.layout.log("method", coded_name(method)))
                    work.log_artifacts("coded-model", paths)
                if variant_names(own).iloc[0] == top:
                    work.log_artifacts("coded-model", paths, ["best"])
                if work.run is None:
                    whole = False
                else:
                    log_method(work.run, own)
        if whole:
            run.steps.finish("wandb-methods", key, [])
