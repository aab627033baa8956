"""Whether the code exposes an expert that answers in time but wrongly, and which one it is: folders of seeds → CSV.

    python notebooks/silent_faults.py runs/photos/seed-* --output faults.csv

All servers answer batches of test inputs of all tasks, without labels. `odds` says of every expert how much its answers
are at odds with what is decoded from the others'. An alarm is a batch in which the oddest expert
is odder than in 99 % of the batches of validation inputs that working servers answer, which neither experts, coded
models nor decoders were fitted on; the oddest is the suspect. ``false_alarm`` is how many batches of test inputs raise
one though all servers work. Beside the coded model stands ``none``: the same with the experts alone.
"""

import argparse
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from jsonargparse import ArgumentParser

from coin.coding import Answers, make_decoder
from coin.data import Calibration, TaskData
from coin.data.tasks import Tasks, task_with
from coin.files.yaml import read_yaml
from coin.modules import Coded
from coin.networks import load_network, run_network
from coin.networks.heads import of_one_width, pad_head


def between(start, expert, share):
    """Return the network that is this share of the way from the shared start to the expert."""
    network, first = deepcopy(expert), start.state_dict()
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(first[name], tensor, share))
    return network


def noisy(expert, share):
    """Return the expert with Gaussian noise on its weights, of this share of their root mean square a tensor."""
    network = deepcopy(expert)
    for weights in network.parameters():
        weights.add_(share * weights.square().mean().sqrt() * torch.randn_like(weights))
    return network


def faults(expert, start):
    """Return what may answer in an expert's place: a roll-out that never was, an old version, damaged memory."""
    return {"start": start, "half-way": between(start, expert, 0.5), "noise": noisy(expert, 0.03)}


def pooled(tasks, split, samples=None):
    """Return inputs of a split of all tasks, at most so many each, their labels, and the index of each one's task."""
    parts = [getattr(task.splits, split) for task in tasks.values()]
    if not all(parts):
        raise SystemExit(
            f"found a task without {split} samples, expected some of each; give it a validation_share"
        )
    parts = [part.subset(range(min(samples or len(part), len(part)))) for part in parts]
    size = next(iter(tasks.values())).image_size
    inputs = torch.cat([batch for part in parts for batch in Calibration.of([part[:][0]], size)])
    which = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
    return inputs, torch.cat([part.targets for part in parts]), which


def distances(decoders, answers):
    """Return how far every expert's answers are from those decoded from the others: squared, in float64 [N, B]."""
    apart = []
    for index, each in enumerate(decoders):
        decoded = each.decode(answers)[0]
        apart.append((decoded - answers.experts[index]).double().square().sum(1))
    return torch.stack(apart)


def odds(wrong, usual, size, batches=1000):
    """Return how much every expert's answers disagree with those decoded from the others [batches, N].

    Expert j's is the root mean square of f̂_j − f_j over a random batch, relative to the same on unread inputs.

    Args:
        wrong: The `distances` of the answers that are judged [N, B].
        usual: Their means on unread inputs [N].
        size: Inputs in a batch.
        batches: How many are drawn.
    """
    draw = torch.Generator().manual_seed(size)
    samples = wrong.shape[1]
    chosen = [torch.randperm(samples, generator=draw)[:size] for _ in range(batches)]
    return (wrong.T[torch.stack(chosen)].mean(1) / usual).sqrt()


def tasks_of(folder, names, image_size):
    """Return the tasks of a seed's folder, loaded, in this order."""
    configuration = read_yaml(folder / "config.yaml")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tasks", type=dict[str, TaskData])
    found = parser.instantiate(parser.parse_object({"tasks": configuration["tasks"]})).tasks
    tasks = {name: task_with(found[name], image_size=image_size) for name in names}
    options = {
        name: configuration["calibration"][name] for name in ("samples_per_task", "batch_size")
    }
    data = Tasks(tasks, **options, seed=configuration["seeds"][0])
    data.prepare_data()
    data.setup()
    return data


@torch.no_grad()
def measure(folder, method, sizes, samples):
    """Yield a row for every expert of a seed's folder, fault and number of inputs in a batch; likewise for `none`."""
    system = Coded.from_run(folder, method, "feature_ridge")
    experts, coded = of_one_width(list(system.experts)), list(system.coded)
    data = tasks_of(folder, system.names, load_network(system.files[0]).config.image_size)
    inputs, labels, which = pooled(data.tasks, "test", samples)

    def answered(batches, experts, coded):
        servers = [*experts, *coded]
        parts = []
        for batch in batches:
            outputs = [run_network(server, batch, features=True) for server in servers]
            parts.append(Answers.of_servers(outputs, len(experts)))
        return Answers.concatenate(parts)

    fit_on = answered(data.calibration(), experts, coded)
    decoders = {
        name: [
            make_decoder("feature_ridge", system.code, [index]).fit(seen)
            for index in range(len(experts))
        ]
        for name, seen in {method: fit_on, "none": fit_on.with_coded([])}.items()
    }

    def apart(answers, name):
        seen = answers.with_coded([]) if name == "none" else answers
        return distances(decoders[name], seen)

    unread = answered(pooled(data.tasks, "validation")[0].split(256), experts, coded)
    on_unread = {name: apart(unread, name) for name in decoders}
    threshold = {
        (name, size): odds(wrong, wrong.mean(1), size).amax(1).quantile(0.99)
        for name, wrong in on_unread.items()
        for size in sizes
    }

    def accuracy(answers, index):
        own = which == index
        return float((answers.experts[index, own].argmax(1) == labels[own]).float().mean())

    working = answered(inputs.split(256), experts, coded)
    usual = {}
    for name, before in on_unread.items():
        wrong = apart(working, name)
        for size in sizes:
            usual[name, size] = odds(wrong, before.mean(1), size)
    for index, (task, classes) in enumerate(zip(system.names, system.classes, strict=True)):
        start = load_network(folder.parent / "base" / f"initial-{classes}.safetensors").network
        start = pad_head(start, working.experts.shape[2])
        torch.manual_seed(index)
        for fault, network in faults(experts[index], start).items():
            one = answered(inputs.split(256), [network], [])
            logits, features = working.experts.clone(), list(working.expert_features)
            logits[index], features[index] = one.experts[0], one.expert_features[0]
            answers = replace(working, experts=logits, expert_features=features)
            right = {
                "expert_accuracy": accuracy(working, index),
                "faulty_accuracy": accuracy(answers, index),
            }
            wrong = {name: apart(answers, name) for name in decoders}
            for (name, size), before in usual.items():
                odd = odds(wrong[name], on_unread[name].mean(1), size)
                most = threshold[name, size]
                yield {
                    "experiment": folder.parent.name, "experts": len(experts),
                    "seed": int(folder.name.removeprefix("seed-")), "method": name, "task": task, "fault": fault,
                    "batch": size, **right, "usual": float(before[:, index].median()),
                    "oddness": float(odd[:, index].median()),
                    "false_alarm": float((before.amax(1) > most).float().mean()),
                    "alarm": float((odd.amax(1) > most).float().mean()),
                    "named": float((odd.argmax(1) == index).float().mean()),
                }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="the folders of seeds")
    parser.add_argument("--output", type=Path, required=True, help="the CSV to write")
    parser.add_argument("--method", default="refit")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8, 32], help="inputs in a batch"
    )
    parser.add_argument("--samples", type=int, default=250, help="test inputs a task, at most")
    given = parser.parse_args()
    rows = [
        row
        for folder in given.folders
        for row in measure(folder, given.method, given.batch, given.samples)
    ]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).round(4).to_csv(given.output, index=False)
