"""What a shell offers on Tab, by argcomplete (extra `completion`)."""

import argparse
import os
from typing import Any


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers a shell that asks how a command may go on, and ends the process; else does nothing."""
    if "_ARGCOMPLETE" in os.environ:  # which argcomplete sets
        import argcomplete

        argcomplete.autocomplete(parser)


def stages(**_: Any) -> list[str]:
    """The stages that `--stage` takes, for argcomplete."""
    from prepretrain import config  # here and not above, as --help does not need it

    return config.stages()
