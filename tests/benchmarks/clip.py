"""Time and memory of every step of the CLIP table, at the networks' true size, with random weights and a few images.

    python tests/benchmarks/clip.py [--size base-patch32 | large-patch14] [--experts N] [--images n] [--blocks n]

One thread, float32, each step in a process of its own: seconds of processor time, which other programs on the machine
hardly change, and the process's high-water mark less what it was before the step, in MiB and in networks. The experts
are a random base with noise on every tensor, of the class counts of the eight tasks. Nothing is downloaded. With fewer
`--blocks` than the tower has, the activations of many images can be measured in less time.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from coin.data import Calibration
from coin.files.safetensors import StateFile, save_state
from coin.files.tensors import fingerprint
from coin.merging import Average, Coin, Experts, Refit, RegMean, TaskArithmetic, Ties, UserMethod, Wudi
from coin.networks import Compression, NetworkConfig, build_network, load_network, save_network
from coin.networks.experts import ExpertFiles
from coin.pipeline.steps.merge import compress_file
from coin.statistics import fisher_diagonal, gram_sums
from coin.statistics.statistic import DataChoice, Statistic, StatisticKind

ROOT = Path(__file__).parents[2]
COUNTS = [397, 196, 45, 10, 10, 43, 10, 47]
LARGE = {
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
}
SIZES: dict[str, dict[str, Any]] = {"base-patch32": {}, "large-patch14": LARGE}  # what differs from CLIPConfig's own
CLOSED = {"average": Average, "task_arithmetic": TaskArithmetic, "ties": Ties, "wudi": Wudi}
FOREIGN = ("iso_c", "tsv_m")
STEPS = ("head", "forward", *CLOSED, "gram", "regmean", "fisher", "coin", "refit", *FOREIGN, "replica")


class Bench:
    """The files of the experts, and what is measured on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        folder, experts = options.folder, options.experts
        self.folder, self.images, self.classes = folder, options.images, COUNTS[:experts]
        self.memory_mib = options.memory_mib
        self.clip = transformers.CLIPConfig(**SIZES[options.size])
        if options.blocks is not None:
            self.clip.vision_config.num_hidden_layers = options.blocks
        self.clip.save_pretrained(folder / "clip")
        self.config = NetworkConfig(f"hf/{folder / 'clip'}", 224, None, {"head": "zero_shot"})
        self.initial = folder / "initial.safetensors"
        self.paths = {f"task{index}": folder / f"task{index}.safetensors" for index in range(experts)}
        self.row = [1 / experts] * experts

    def write(self) -> None:
        """Write the base and the experts."""
        network = build_network(self.config, self.classes[0], seed=0)
        save_network(self.initial, network, self.config, self.classes[0], {"made_by": "a benchmark"})
        starts = StateFile(self.initial)
        for seed, (path, classes) in enumerate(zip(self.paths.values(), self.classes, strict=True), 1):
            draw = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                network.head.weight = torch.nn.Parameter(torch.randn(classes, network.head.in_features, generator=draw))
                for name, parameter in network.vision.named_parameters():
                    start = starts[f"vision.{name}"]
                    noise = torch.randn(start.shape, generator=draw)
                    parameter.copy_(start + 0.1 * start.std(correction=0) * noise)
            save_network(path, network, self.config, classes, {"made_by": "a benchmark"})

    def batches(self, images: int) -> list[torch.Tensor]:
        """Return so many random images."""
        return list(torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(0)).split(8))

    def experts(self, statistic: Statistic | None = None) -> Experts:
        """Return the experts in files, with their images and the files of a statistic."""
        own = {which: {task: self.statistic(which, task) for task in self.paths} for which in [statistic] if which}
        data = [Calibration.of_batches(self.batches(self.images)) for _ in self.paths]
        return Experts(ExpertFiles(self.paths, self.initial), calibration=data, statistics=own)

    def statistic(self, which: Statistic, task: str) -> Path:
        """Return the file of a statistic."""
        return self.folder / f"{task}.{which.name}.safetensors"

    def estimate(self, which: Statistic) -> Callable[[], None]:
        """Return the making of a statistic of all experts."""

        def run() -> None:
            for task, path in self.paths.items():
                file = load_network(path)
                if which.kind is None:
                    values = gram_sums(file.network, self.batches(self.images)).mean()
                else:
                    values = fisher_diagonal(file.network, self.batches(self.images), kind=which.kind, mc_samples=1)
                made = {"statistic": str(which.name), "data": "own", "samples": self.images, "seconds": 0, "passes": 0}
                kind = {} if which.kind is None else {"kind": str(which.kind)}
                weights = {"weights": fingerprint(file.state)}
                save_state(self.statistic(which, task), values, {**made, **kind, **weights})

        return run

    def step(self, name: str) -> Callable[[], Any]:
        """Return a step; what it reads is in files."""
        gram = Statistic(StatisticKind.gram, DataChoice.own, None)
        fisher = Coin(fisher_kind="monte_carlo", fisher_data="own").statistics()[0]
        task = next(iter(self.paths))
        if name == "head":
            return self.texts
        if name == "forward":
            network, batches = load_network(self.paths[task]).network, self.batches(self.images)
            return torch.no_grad()(lambda: [network(batch) for batch in batches])
        if name in CLOSED:
            return lambda: CLOSED[name]().make(self.experts(), self.row)
        if name in ("gram", "fisher"):
            return self.estimate(gram if name == "gram" else fisher)
        if name == "regmean":
            return lambda: RegMean(gram_data="own").make(self.experts(gram), self.row)
        if name == "coin":
            return lambda: Coin(fisher_kind="monte_carlo", fisher_data="own").make(self.experts(fisher), self.row)
        if name == "refit":
            return lambda: Refit("own", memory_mib=self.memory_mib).make(self.experts(), self.row)
        if name in FOREIGN:
            sys.path.append(str(ROOT))
            return lambda: UserMethod(f"notebooks.foreign_methods.{name}").make(self.experts(), self.row)
        packed = self.folder / "packed.safetensors"
        return lambda: compress_file(self.paths[task], packed, self.initial, Compression(bits=3, base_bits=8))

    @torch.no_grad()
    def texts(self) -> None:
        """Run the text tower on 64 prompts of 16 tokens."""
        config = self.clip.text_config
        config.projection_dim = self.clip.projection_dim
        transformers.CLIPTextModelWithProjection(config)(input_ids=torch.randint(3, 999, (64, 16)))


def measured(bench: Bench, name: str) -> dict[str, float]:
    """Return the processor's seconds of a step and the MiB that it adds to the process."""
    step = bench.step(name) if name != "write" else bench.write
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.process_time()
    step()
    seconds = time.process_time() - began
    return {"seconds": seconds, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before}


def main() -> None:
    """Measure every step in a process of its own, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base-patch32", choices=["base-patch32", "large-patch14"])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--blocks", type=int, help="of the vision tower, where not all")
    parser.add_argument("--memory_mib", type=int, default=16384, help="of Refit; the default is that of the table")
    parser.add_argument("--folder", type=Path, help="keeps the files")
    parser.add_argument("--steps", nargs="+", default=STEPS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        print(json.dumps(measured(Bench(options), options.only)))
        return
    with TemporaryDirectory() as own:
        folder = options.folder or Path(own)
        folder.mkdir(parents=True, exist_ok=True)
        same = ("size", "experts", "images", "blocks", "memory_mib")
        given = [f"--{name}={getattr(options, name)}" for name in same if getattr(options, name) is not None]
        command = [sys.executable, "-W", "ignore", __file__, *given, f"--folder={folder}"]
        model = 0.0
        print(f"CLIP {options.size}, {options.experts} experts, {options.images} images each, one thread")
        print(f"{'step':18}{'seconds':>9}{'MiB':>8}{'networks':>10}")
        written = (folder / f"task{options.experts - 1}.safetensors").is_file()
        for name in [*([] if written else ["write"]), *options.steps]:
            done = subprocess.run([*command, "--only", name], capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
                print(f"{name:18}failed: {last}", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            model = model or (folder / "task0.safetensors").stat().st_size / 2**20
            print(f"{name:18}{found['seconds']:9.1f}{found['mib']:8.0f}{found['mib'] / model:10.2f}", flush=True)


if __name__ == "__main__":
    main()
