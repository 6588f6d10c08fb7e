"""Test what terminals and files show of tables and lines."""

from __future__ import annotations

import io

from rich.console import Console

from smallvit.utils.terminal import print_indented, print_table

ROWS = [["model", *(f"figure {n}" for n in range(12))], *([name, *["12.34 ± 0.56"] * 12] for name in ("vit", "pit"))]


def shown(rows: list[list[str]], *, terminal: bool, width: int = 80) -> list[str]:
    output = io.StringIO()
    print_table(Console(file=output, force_terminal=terminal, width=width, color_system=None), rows)
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_a_terminal_wraps_a_table_by_column() -> None:
    lines = shown(ROWS, terminal=True)
    assert max(map(len, lines)) <= 80
    parts = "\n".join(lines).split("\n\n")
    assert len(parts) > 1
    assert all([row.split()[0] for row in part.splitlines()[2:]] == ["vit", "pit"] for part in parts)
    assert sum(part.splitlines()[0].count("figure") for part in parts) == 12
    assert "\n".join(lines).count("12.34 ± 0.56") == 24


def test_a_file_gets_a_table_in_whole() -> None:
    header, _, *rows = shown(ROWS, terminal=False)
    assert header.count("figure") == 12
    assert [row.count("12.34 ± 0.56") for row in rows] == [12, 12]


def test_a_terminal_breaks_lines_at_words_and_indents_them() -> None:
    text = "data   a-folder/with-a-name and quite a few words behind it"
    for terminal, expected in (
        (True, ["data   a-folder/with-a-name", "       and quite a few words", "       behind it"]),
        (False, [text]),
    ):
        output = io.StringIO()
        print_indented(Console(file=output, force_terminal=terminal, width=30), text)
        assert output.getvalue().splitlines() == expected
