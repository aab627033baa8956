"""CLINC150's texts as the tables that `coin.data.TextFile` reads: a folder for each of its ten domains.

    python notebooks/clinc.py data_full.json domains.json data/intents    # data/intents/DOMAIN/{train,test}.csv

The two files lie in https://github.com/clinc/oos-eval/tree/828f8093932c8fe6ca7936c3d2e52903b1c523de/data (CC BY 3.0;
Larson et al., *An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction*, EMNLP 2019). Of each of a
domain's 15 intents `train.csv` has the 100 texts for training and the 20 for validation, `test.csv` the 30 for tests.
"""

import json
import sys
from pathlib import Path

import pandas as pd

if __name__ == "__main__":
    texts, domains = (json.loads(Path(file).read_text(encoding="utf-8")) for file in sys.argv[1:3])
    parts = {"train": texts["train"] + texts["val"], "test": texts["test"]}
    for domain, intents in domains.items():
        folder = Path(sys.argv[3]) / domain
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in parts.items():
            table = pd.DataFrame(rows, columns=["text", "label"])
            table[table.label.isin(intents)].to_csv(folder / f"{name}.csv", index=False)
