"""What a command takes from Hugging Face: found in its place or not, and fetched."""

from pathlib import Path

from coin.errors import FileError, first_line
from coin.files.atomic import sha256_of

# In a folder of Hugging Face's, the better one first.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def hub_weights(place: str) -> list[Path]:
    """Return the files of weights of a folder, or of an ID that is in the cache of huggingface_hub; [] without them."""
    from huggingface_hub import snapshot_download

    folder = Path(place)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(place, local_files_only=True))
        except (OSError, ValueError):  # nothing of it is in the cache, or it is no ID
            return []
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
    return sorted(folder.glob("model-*-of-*.safetensors"))


def folder_contents(place: str, *, weights: bool) -> dict[str, str]:
    """Return the SHA-256 of a local folder's configuration and, with `weights`, of these, by name; {} for an ID."""
    folder = Path(place)
    if not folder.is_dir():
        return {}
    files = list(folder.glob("*.json"))
    if weights:
        files += hub_weights(place)
    return {path.name: sha256_of(path) for path in sorted(files)}


def fetch_from_hub(place: str) -> None:
    """Download what is missing of an ID, its weights in one format; a FileError where the hub has or gives none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        for names in (["*.json", "*.txt", WEIGHTS[0], "model-*.safetensors"], [WEIGHTS[1]]):
            if not hub_weights(place):
                snapshot_download(place, allow_patterns=names)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileError(
            f"cannot download hf/{place} ({first_line(error)[:150]}); fill the cache of huggingface_hub (HF_HOME) and "
            "set HF_HUB_OFFLINE=1, or give a folder"
        ) from error
