"""The command line, started within the tests' own process."""

import pytest

from itda_lens import cli


def run(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments])


def fails(capsys, *arguments: object, status: int = 2) -> str:
    """What a command says as it ends with an error."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == status
    return capsys.readouterr().err
