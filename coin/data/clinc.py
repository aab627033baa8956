"""The intents of CLINC150."""

import json
from pathlib import Path
from typing import Any

from torch.hub import download_url_to_file

from coin.data.samples import Samples, Source
from coin.data.task import unusable_files
from coin.data.text import TextTask
from coin.errors import ConfigurationError, DataError
from coin.files.atomic import sha256_of

URL = (
    "https://raw.githubusercontent.com/clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data"
)
SHA256 = {
    "data_full.json": "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",
    "domains.json": "b947b579d3b8e74b06f93b01083d8efaff2888b43a3e362533bd88a6e1211b3a",
}
"""The files at that address, which are kept in ``ROOT/clinc150``."""


class Clinc(TextTask):
    """Requests to an assistant in one domain of CLINC150: 15 intents, each with 100, 20 and 30 texts.

    They are for training, validation and testing, as in the data set.

    Source: Larson et al., *An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction* (EMNLP 2019),
    https://github.com/clinc/oos-eval, CC BY 3.0.

    Args:
        domain: ``banking``, ``credit_cards``, ``kitchen_and_dining``, ``home``, ``auto_and_commute``, ``travel``,
            ``utility``, ``work``, ``small_talk`` or ``meta``.
        root: The folder for downloaded data.
        download: Download what is missing. False is for machines without network: errors name the place of the files.
    """

    def __init__(
        self,
        domain: str = "banking",
        *,
        root: str = "data",
        download: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.domain = domain
        self.root = Path(root)
        self.download = download

    def class_names(self) -> tuple[str, ...]:
        """The intents of the domain."""
        domains = self.once("domains", lambda: self._json("domains.json"))
        if self.domain not in domains:
            raise ConfigurationError(
                f"found domain={self.domain!r}, expected one of {', '.join(domains)}"
            )
        return tuple(domains[self.domain])

    def prepare_data(self) -> None:
        """Download what is missing, if ``download`` is set; a `DataError` if that fails."""
        for name in SHA256:
            self._file(name)

    def check_files(self) -> None:
        """Refuse files that cannot be read and are not to be downloaded."""
        if not self.download:
            self.prepare_data()

    def load(self) -> Source:
        """Read and tokenise the texts."""
        data = self._json("data_full.json")
        return Source(
            train=self._split(data["train"]),
            test=self._split(data["test"]),
            validation=self._split(data["val"]),
        )

    def _split(self, rows: list[tuple[str, str]]) -> Samples:
        """Return the samples of the domain, of rows of a text and its intent."""
        labels = {intent: label for label, intent in enumerate(self.class_names())}
        texts = []
        targets = []
        for text, intent in rows:
            if intent in labels:
                texts.append(text)
                targets.append(labels[intent])
        return self.samples(texts, targets)

    def _json(self, name: str) -> Any:
        return json.loads(self._file(name).read_text(encoding="utf-8"))

    def _file(self, name: str) -> Path:
        """Return the path of a file, downloaded if it is missing; a DataError if its contents are not upstream's."""
        folder = self.root / "clinc150"
        path = folder / name
        try:
            if self.download and not path.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                download_url_to_file(
                    f"{URL}/{name}", str(path), hash_prefix=SHA256[name], progress=False
                )
            if sha256_of(path) != SHA256[name]:
                raise DataError(f"{name} has another SHA-256 than {SHA256[name]}")
        except (OSError, RuntimeError, DataError) as error:
            raise unusable_files("Clinc", folder, self.download, error) from error
        return path
