"""The table in the docs is of these tests."""

import re
from pathlib import Path

from tests.compatibility import SURFACES

TABLE = Path(__file__).parent.parent / "docs" / "compatibility.md"


def test_the_table_has_every_surface_and_says_that_none_fails():
    _, *rows = re.findall(r"^\| (.+?) \| (\w.*?) \|", TABLE.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == [surface.name for surface in SURFACES]
    assert "fails" not in {verdict for _, verdict in rows}
