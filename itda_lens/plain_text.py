r"""Text of others (prompts, tokens, names, paths, messages) as nothing but text: on a terminal, a page, a sheet."""

import re
import unicodedata

# Letters and marks that are drawn as nothing, which Unicode does not count among the format characters.
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0\U000e0100-\U000e01ef]")
_FORMULA = re.compile(r"[\t\r\n]|\s*[=+\-@＝＋－＠]")  # noqa: RUF001


def printable(text: str) -> str:
    r"""Text on which no terminal acts: what is not there to be seen becomes an escape, as Python writes it.

    These are control characters (but for newlines), bidirectional and zero-width ones, line separators of Unicode and
    lone surrogates. Spaces of any kind stay.

    Example:
        >>> print(printable("\x1b]0;title\x07 a\u202eb \ud800"))
        \x1b]0;title\x07 a\u202eb \ud800
    """
    return "".join(c if _is_plain(c) else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    r"""As `printable`, with newlines as ↵.

    Example:
        >>> one_line("a\nb\rc")
        'a↵b\\rc'
    """
    return printable(text.replace("\n", "↵"))


def markdown(text: str) -> str:
    r"""One line of literal text in a page of Markdown, in a cell of a table too: a code span that nothing in it ends.

    Example:
        >>> markdown("<b>[a](b)</b>"), markdown("`|`")
        ('`<b>[a](b)</b>`', '`` `\\x7c` ``')
    """
    if not text:
        return ""
    shown = one_line(text).replace("|", r"\x7c")  # renderers differ in how a cell can hold one
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    # Markdown takes one space off both ends, unless there is nothing else.
    room = " " if shown.strip(" ") and (shown[0] in " `" or shown[-1] in " `") else ""
    return f"{fence}{room}{shown}{room}{fence}"


def spreadsheet(text: str) -> str:
    """Text that no spreadsheet takes for a formula: with an apostrophe before it, if it begins as one.

    Example:
        >>> spreadsheet("=1+1"), spreadsheet("1 + 1")
        ("'=1+1", '1 + 1')
    """
    return f"'{text}" if _FORMULA.match(text) else text


def _is_plain(character: str) -> bool:
    if _UNSEEN.match(character):
        return False
    return character.isprintable() or character == "\n" or unicodedata.category(character) == "Zs"
