"""``python -m coin``, and the ``coin`` command."""

import sys
from typing import NoReturn


def entry_point() -> NoReturn:
    """Run the command line of the process."""
    from coin.core.runtime import tune_process

    tune_process()
    from coin.cli import main

    sys.exit(main())


if __name__ == "__main__":
    entry_point()
