"""The command line's parser: LightningCLI's, with one line for a mistake instead of a page."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from coin.errors import ConfigurationError
from coin.files.yaml import read_yaml


class CoinParser(LightningArgumentParser):
    """LightningCLI's parser, which tells what was found, what was expected and what to do."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `ConfigurationError` with the message on one line."""
        raise ConfigurationError(in_one_line(str(message), _options(self))) from ex

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parse a configuration file that has no key twice; YAML itself would take the last one."""
        read_yaml(Path(str(path)))
        return super().parse_path(path, *args, **kwargs)

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """Build what a configuration names; a section that is null has no options to build it of."""
        try:
            return super().instantiate_classes(cfg, **kwargs)
        except TypeError as error:
            if not (found := re.search(r"must be a mapping, not (\w+)", str(error))):
                raise
            kind = "null" if found[1] == "NoneType" else f"a {found[1]}"
            raise ConfigurationError(
                f"found a section that is {kind} (one of network, expert, calibration, wandb, launch), expected its "
                "options; leave the section out for its defaults"
            ) from error


def in_one_line(message: str, options: Iterable[str] = ()) -> str:
    """Return a parser's message as one line: what was found, what was expected, what to do.

    Args:
        message: What jsonargparse or argparse says.
        options: The options that there are, to say which one may have been meant.
    """
    text = " ".join(message.split())
    if found := re.search(r"does not accept (?:option|nested key) '([^']*)'|unrecognized arguments: (.*)", text):
        option = found[1] or found[2]
        return f"found option '{option}', expected one that coin has{_meant(option, options)}; see coin COMMAND --help"
    if found := re.match(r"Parser key \"config\": (?:File does not exist|Path is not a file): '?(.*?)'?$", text):
        return f"found no file '{found[1]}', expected an experiment's or a command's YAML; check the path after -c"
    if found := re.match(r"(?:Parser key \"config\": )?Unexpected config: ?(.*)", text):
        shown = f"'{found[1][:80]}'" if found[1] else "nothing"
        return f"found {shown} as a configuration, expected YAML of 'key: value' lines; see configs/"
    if found := re.match(
        r"(?:the following arguments are|Option '?.*'? is) required: (.*)|Key \"(.*)\" is required", text
    ):
        missing = found[1] or found[2]
        return f"found no {missing}, expected it; give it as an option or in a YAML file after -c"
    if found := re.match(r"(?:Parser key \"(.*?)\": )?Does not validate against any of the Union subtypes", text):
        errors = re.search(r"Errors: - (.*?) Given value type", text)
        reasons = re.split(r" - (?=[A-Z])", errors[1]) if errors else []
        told = [reason for reason in reasons if not reason.startswith("Expected a dot import path string")]
        value = re.search(r"Given value: (.*)$", text)
        given = f" ({value[1][:120]})" if value else ""
        reason = (told or reasons or [text])[0]
        return f"found '{found[1] or ''}' with a value that fits none of its types{given}: {reason}"
    if found := re.match(r"argument subcommand: invalid choice: '(.*?)' \(choose from (.*)\)", text):
        return f"found command '{found[1]}', expected one of {found[2]}; see coin --help"
    if found := re.match(r"Parser key \"(.*?)\": Expected an? <class '(\w+)'>\. Got value: (.*)", text):
        return f"found {found[1]}={found[3]}, expected a value of type {found[2]}; change it"
    if found := re.match(r"Parser key \"(.*?)\": Expected a member of <enum .*?>: \{(.*?)\}\. Got value: (.*)", text):
        return f"found {found[1]}={found[3]}, expected one of {found[2].replace(',', ', ')}; change it"
    if found := re.match(r"Parser key \"(.*?)\": Expected a dot import path string: (.*)", text):
        return (
            f"found class '{found[2][:80]}' in '{found[1]}', expected one of coin's, or a dotted import path; check "
            "the spelling"
        )
    if found := re.match(r"Parser key \"(.*?)\": Unable to load config '(.*?)'", text):
        return f"found {found[1]}={found[2][:80]}, expected its options as 'key: value', or a YAML file; change it"
    if found := re.match(r"Parser key \"(.*?)\": Option '(.*?)' is not accepted", text):
        return f"found option '{found[2]}' in '{found[1]}', expected one that its class has; check the spelling"
    return text


def _meant(option: str, options: Iterable[str]) -> str:
    name = option.split("=")[0].split(" ")[0].lstrip("-")
    close = difflib.get_close_matches(name, sorted(set(options)), n=1, cutoff=0.75)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _options(parser: LightningArgumentParser) -> set[str]:
    """Return the names of all options of a parser and of its commands."""
    found = {action.dest for action in parser._actions}
    commands: Any = parser._subcommands_action
    for command in ({} if commands is None else commands.choices or {}).values():
        found |= {action.dest for action in command._actions}
    return found
