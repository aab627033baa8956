"""Files of an experiment that lie elsewhere: a shared path is read in place, a URI is fetched once a machine."""

import hashlib
from pathlib import Path

from filelock import FileLock

from coin.errors import FileError, first_line

CACHE = Path.home() / ".cache" / "coin" / "served"
_SERVED = ("results.csv", "results.json", "config.yaml", "experts/*/expert.safetensors", "coded/*.safetensors")


def local_folder(folder: str, cache: Path | None = None) -> Path:
    """Return where a folder is on this machine: a path as it is, a URI (``s3://…``) after what serves is fetched.

    Args:
        folder: A path, or a URI that fsspec reads; of an experiment, or of one seed.
        cache: Where what is fetched is kept; none takes ``~/.cache/coin/served``.

    Raises:
        FileError: It cannot be read.
    """
    if "://" not in folder:
        return Path(folder)
    import fsspec

    place = (CACHE if cache is None else cache) / hashlib.sha256(folder.encode()).hexdigest()[:16]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock"):
            system, root = fsspec.core.url_to_fs(folder)
            root = root.rstrip("/")
            for pattern in (part for name in _SERVED for part in (name, f"seed-*/{name}")):
                for found in system.glob(f"{root}/{pattern}"):
                    target = place / str(found)[
                        len(root.lstrip("/")) if not str(found).startswith("/") else len(root) :
                    ].lstrip("/")
                    if not target.is_file() or target.stat().st_size != system.size(found):
                        target.parent.mkdir(parents=True, exist_ok=True)
                        part = target.with_suffix(target.suffix + ".part")
                        system.get_file(found, str(part))
                        part.rename(target)
    except Exception as error:  # every file system has errors of its own
        raise FileError(
            f"cannot fetch '{folder}' ({first_line(error)}); check the address and its credentials"
        ) from error
    return place
