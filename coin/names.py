"""Names that become folders and files."""

_LONGEST = 200
"""Bytes; file systems take 255, and what is made of a name is longer than it."""


def is_folder_name(name: str) -> bool:
    """Return whether a folder of this name is one, visible, and lies where it is put: no separators, no ``..``."""
    return (
        bool(name)
        and not name.startswith(".")
        and not any(mark in name for mark in "/\\")
        and name.isprintable()
        and len(name.encode()) <= _LONGEST
    )
