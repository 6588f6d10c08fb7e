"""Names that people gave, as they can be shown: on one line, without what no terminal or picture can print.

Needs no torch.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """A text as it is, but for bytes of file names that are no UTF-8, which are spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(name: str) -> str:
    """A name without line breaks, and with single spaces."""
    return " ".join(name.split())
