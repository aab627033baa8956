"""Shows the doctests of docstrings as code on the site: an extension of griffe, which reads Python for mkdocstrings."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).*)*", flags=re.MULTILINE)


class Examples(Extension):
    """Puts every example of a docstring into a block of code."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Change an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(
                lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value
            )
