"""The option ``head`` of a task: prompts and class names, of which CLIP's text tower computes a zero-shot head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coin.core.choices import is_list_of_names
from coin.errors import ConfigurationError
from coin.files.yaml import read_yaml

_EXPECTED = "expected head: {zero_shot: {prompts: ['a photo of a {}.'], classes: [...]}}, or a YAML file with these two"


def read_head(given: Any) -> dict[str, Any] | None:
    """Return ``{zero_shot: {prompts: [...], classes: [...]}}`` or ``{zero_shot: FILE.yaml}`` with the file's contents.

    ``{}`` in a prompt stands for the class; without classes it is the task's own names, with spaces for underscores.
    Raises ConfigurationError if it is something else, a prompt has no ``{}`` or two classes have one name, FileError
    where the file cannot be read.
    """
    if given is None:
        return None
    section = given.get("zero_shot") if isinstance(given, Mapping) and set(given) == {"zero_shot"} else None
    if isinstance(section, str):
        section = read_yaml(Path(section))
    if not isinstance(section, Mapping) or not {"prompts"} <= set(section) <= {"prompts", "classes"}:
        raise ConfigurationError(f"found head {given!r:.200}, {_EXPECTED}")
    prompts, classes = section["prompts"], section.get("classes")
    if not is_list_of_names(prompts) or not all("{}" in prompt for prompt in prompts):
        raise ConfigurationError(
            f"found head.zero_shot.prompts {prompts!r:.200}, expected a list of texts with {{}} for the class"
        )
    if classes is not None and (not is_list_of_names(classes) or len(set(classes)) < len(classes)):
        told = f"found head.zero_shot.classes {classes!r:.200}, expected a list of distinct names"
        raise ConfigurationError(f"{told}, in the order of the labels; put numbers in quotes")
    return {"zero_shot": {"prompts": list(prompts), "classes": None if classes is None else list(classes)}}
