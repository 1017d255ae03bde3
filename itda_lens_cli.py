"""Starts the command `itda-lens`. It stands beside the package since importing that imports torch and SAELens, which
takes seconds, and help or a mistyped option should not have to wait for them."""

import importlib.util
import sys


def main() -> None:
    """Read the arguments first, then import `itda_lens`, and do what they say."""
    spec = importlib.util.find_spec("itda_lens")
    assert spec is not None
    loader = spec.loader
    assert loader is not None
    # The package without what its __init__ imports; its command line needs none of that until it runs.
    package = importlib.util.module_from_spec(spec)
    sys.modules["itda_lens"] = package
    from itda_lens import cli

    cli.main(load=lambda: loader.exec_module(package))
