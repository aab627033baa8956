"""The collected table of a sweep, as a file's rows and in the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from coin.reporting.results import read_results
from coin.reporting.summary import seed_means
from coin.reporting.table import decoder_heading
from coin.sweeps.points import as_text


def sweep_frame(points: Sequence[tuple[Mapping[str, Any], Sequence[Path]]]) -> pd.DataFrame:
    """Return the rows of all points' results: the columns of ``results.csv`` behind one column per swept key.

    Args:
        points: The swept keys' values and the seeds' folders of every finished point. A value that is a list or a
            section is written as JSON.

    Raises:
        FileError: A point's results are missing or damaged.
    """
    frames = []
    for values, folders in points:
        frame = pd.concat([read_results(folder) for folder in folders], ignore_index=True)
        for place, (key, value) in enumerate(values.items()):
            plain = value if isinstance(value, bool | int | float | str) else as_text(value)
            frame.insert(place, key, [plain] * len(frame))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def sweep_table(frame: pd.DataFrame, swept: Sequence[str], title: str) -> Table:
    """Return a table of mean NDA in %, a line per point and method, a column per decoder.

    Points that differ in their seeds alone share a line: mean ± standard deviation over seeds. The oracle, whose NDA
    is 1 everywhere, is left out.

    Args:
        frame: What `sweep_frame` returns.
        swept: The swept keys, the frame's first columns.
        title: The table's title.
    """
    keys = [key for key in swept if key != "seeds"]
    per_seed = _per_seed(frame, swept)
    per_seed = per_seed[per_seed["method"] != "oracle"]
    several = per_seed["erased"].nunique() > 1
    heads = [*keys, *(["erased"] if several else []), "method", "batchnorm"]
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(Text({"batchnorm": "BatchNorm"}.get(head, head.rsplit(".")[-1])), overflow="fold")
    decoders = list(dict.fromkeys(per_seed["decoder"]))
    for decoder in decoders:
        table.add_column(decoder_heading(decoder), justify="right", overflow="fold")
    before: Any = None
    for line, group in per_seed.groupby(heads, sort=False, dropna=False):
        point = line[: len(keys)]
        if before is not None and point != before:
            table.add_section()
        cells = [_cell(group.loc[group["decoder"] == decoder, "nda"]) for decoder in decoders]
        table.add_row(*(Text(str(part) or "–") for part in line), *cells)
        before = point
    return table


def _per_seed(frame: pd.DataFrame, swept: Sequence[str]) -> pd.DataFrame:
    """Return the means over tasks of every seed, in the order of the points, with the swept keys' columns."""
    points = frame[["experiment", *swept]].drop_duplicates("experiment")
    return seed_means(frame.drop(columns=list(swept))).merge(points, on="experiment", how="left")


def _cell(values: "pd.Series[float]") -> Text:
    if values.empty or values.isna().any():
        return Text("–")
    spread = f" ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return Text(f"{100 * values.mean():.1f}{spread}")
