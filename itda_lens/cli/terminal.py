"""The terminal, on which all that is printed is text."""

from typing import Any

from rich.console import Console
from rich.text import Text

from itda_lens.plain_text import printable


class Terminal(Console):
    """Prints strings as they are: without markup, and without anything on which a terminal acts.

    What the encoding of the terminal lacks is printed as an escape.
    """

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Rich makes of every string that it is given, in a table too, a text by this."""
        shown = printable(text).encode(self.encoding, "backslashreplace").decode(self.encoding)
        return super().render_str(shown, **settings)
