"""What a command would download: named with its size, found in its place or not, and fetched from Hugging Face."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from coin.errors import FileError, first_line

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder of Hugging Face's, the better one first


@dataclass(frozen=True)
class Download:
    """Something that comes from the network."""

    what: str  # an identifier, or a data set
    host: str  # where it comes from; '' for what has to be put in its place by hand
    mib: float | None  # None where the size is not known
    there: bool  # whether it is here already
    advice: str  # how to get it by hand


def names_a_file(weights: str) -> bool:
    """Whether weights are given by a file, and not by a name such as ``IMAGENET1K_V2``."""
    return weights.endswith((".safetensors", ".pt", ".pth", ".ckpt", ".bin")) or os.sep in weights


def hub_weights(place: str) -> list[Path]:
    """Return the files of weights of a folder, or of an ID that is in the cache of huggingface_hub; [] without them."""
    if Path(place).is_dir():
        folder = Path(place)
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = [try_to_load_from_cache(place, name) for name in ("config.json", *WEIGHTS)]
        found = next((Path(path) for path in cached if isinstance(path, str)), None)
        if found is None:
            return []
        folder = found.parent
    whole = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    return [whole] if whole else sorted(folder.glob("model-*-of-*.safetensors"))


def fetch_from_hub(place: str) -> None:
    """Download what is missing of an ID, its weights in one format; a FileError where the hub has or gives none."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    if hub_weights(place):
        return
    try:
        snapshot_download(place, allow_patterns=["*.json", "*.txt"])
        for name in WEIGHTS:
            try:
                hf_hub_download(place, name)
                return
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError):  # of the network, not of the repository
                    raise
        snapshot_download(place, allow_patterns=["model-*.safetensors"])  # in several files
    except (OSError, ValueError, HfHubHTTPError) as error:
        told = f"cannot download hf/{place} ({first_line(error)[:150]})"
        raise FileError(f"{told}; fill the cache of huggingface_hub (HF_HOME), or give a folder") from error


def is_found(host: str) -> bool:
    """Return whether a host has an address, or a proxy is set, which may reach it."""
    import socket  # these two take 50 ms, and every command imports this file
    from urllib.request import getproxies

    with suppress(OSError):
        return bool(getproxies() or socket.getaddrinfo(host, 443))
    return False


@contextmanager
def offline_unless_found() -> Iterator[None]:
    """Run a block with the hub's cache alone where the hub's host has no address: it would try for half a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not is_found(urlsplit(constants.ENDPOINT).hostname or "")
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def check_downloads(downloads: Sequence[Download]) -> None:
    """Raise a FileError that names all that is missing and cannot be downloaded: no network, or only by hand."""
    waiting = {each.host for each in downloads if not each.there}
    reachable = {host for host in waiting if host and is_found(host)}
    if missing := [each for each in downloads if not each.there and each.host not in reachable]:
        names = ", ".join(each.what for each in missing)
        network = "" if any(not each.host for each in missing) else " without a network"
        advice = "; ".join(dict.fromkeys(each.advice for each in missing))
        raise FileError(f"found {len(missing)} missing inputs that cannot be downloaded{network}: {names}; {advice}")
