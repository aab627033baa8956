"""What is imported is what pyproject.toml asks for."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORT = re.compile(
    r"^ *(?:from ([a-zA-Z_]\w*)[\w.]* import |import (\w+)[\w.]*(?: as \w+)?(?:  #|$))",
    re.MULTILINE,
)
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
"""Packages whose module has another name."""


def imported():
    """Return the top-level modules that the package imports, of other packages."""
    found = set()
    for path in (ROOT / "coin").rglob("*.py"):
        for source, module in IMPORT.findall(path.read_text(encoding="utf-8")):
            found.add(source or module)
    return found - sys.stdlib_module_names - {"coin"}


def asked():
    """Return the modules of the packages that coin and its extras ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = list(project["dependencies"])
    for name in extras.keys() - {"dev", "docs"}:
        requirements += extras[name]
    packages = [re.split(r"[\[<>=!~ ]", requirement)[0].lower() for requirement in requirements]
    return {MODULES.get(package, package.replace("-", "_")) for package in packages}


def test_every_package_that_is_imported_is_asked_for():
    assert {"torch", "jsonargparse", "PIL"} < imported()
    assert imported() <= asked() | {"starlette"}  # of fastapi, which asks for it
