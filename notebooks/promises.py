"""Whether the promise on decoded answers holds, over random splits of stored test answers: folders of seeds → CSV.

    python notebooks/promises.py runs/pair/seed-* --output splits.csv

Every split takes some of the test answers in ``risk.npz`` for the promise, and looks at the accepted ones of the rest.
``given`` is the share of the splits in which anything is promised; ``broken`` that in which more of the accepted rest
differ than α, by chance too: the rest is small; ``untrue`` that in which more do of all stored answers, which is what
the promise is about. ``coverage`` and ``found`` are means, the latter over the splits with a promise.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from coin.coding import promised_risk
from coin.reporting.extras import RISK_NPZ


def split(answers, samples, alpha, confidence, splits, seed=0):
    """Return how the promise turns out over random splits of answers, float [n, 2]: risks, and whether they differ."""
    draw, rows = np.random.default_rng(seed), []
    for _ in range(splits):
        order = draw.permutation(len(answers))
        new, rest = answers[order[:samples]], answers[order[samples:]]
        found = promised_risk(*torch.from_numpy(new).T, alpha, confidence)
        threshold = -np.inf if found.threshold is None else found.threshold
        kept, every = (part[part[:, 0] <= threshold, 1] for part in (rest, answers))
        share = kept.mean() if len(kept) else np.nan
        untrue = len(every) > 0 and every.mean() > alpha
        rows.append((found.threshold is not None, share > alpha, untrue, len(kept) / len(rest), share))
    return dict(zip(("given", "broken", "untrue", "coverage", "found"), pd.DataFrame(rows).mean(), strict=True))


def measure(folder, samples, alphas, confidence, splits):
    """Yield a row for every method, decoder, lost expert and α of a seed's folder."""
    with np.load(folder / RISK_NPZ) as stored:
        for key in stored.files:
            method, batchnorm, decoder, erased, task = key.split("|")
            if erased != task or method == "oracle":
                continue
            about = {"experiment": folder.parent.name, "seed": int(folder.name.removeprefix("seed-")),
                     "method": method, "batchnorm": batchnorm, "decoder": decoder, "task": task}  # fmt: skip
            for alpha in alphas:
                found = split(stored[key], samples, alpha, confidence, splits)
                yield {**about, "alpha": alpha, "confidence": confidence, "samples": samples, **found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="the folders of seeds")
    parser.add_argument("--output", type=Path, required=True, help="the CSV to write")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.05, 0.02, 0.01])
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--samples", type=int, default=600, help="test answers for the promise")
    parser.add_argument("--splits", type=int, default=200)
    given = parser.parse_args()
    options = given.samples, given.alpha, given.confidence, given.splits
    frame = pd.DataFrame([row for folder in given.folders for row in measure(folder, *options)])
    given.output.parent.mkdir(parents=True, exist_ok=True)
    frame.round(4).to_csv(given.output, index=False)
    print(frame.groupby(["method", "decoder", "alpha"])[["given", "broken", "untrue", "coverage", "found"]].mean())
