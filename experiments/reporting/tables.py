"""Tables for the terminal and for Markdown."""

import re
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable

# Headings and rows.
Table = tuple[Sequence[str], Sequence[Sequence[str]]]

# As much as fits into 80 columns; GAP is the blanks between two of a table's.
LAYOUT = {"box": SIMPLE, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
GAP = 2
# What Markdown would not show as it is; between letters an underscore means nothing to it.
MARKDOWN = re.compile(r"[\\`*<\[|~]|&(?=[#\w])|(?<![^\W_])_|_(?![^\W_])")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is of names, the others of numbers."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    escaped = (map(escape, line) for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def escape(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return MARKDOWN.sub(r"\\\g<0>", text)


def counted(count: int, noun: str) -> str:
    """`1 epoch`, `2,000 epochs`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def print_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], console: Console, title: str = ""
) -> None:
    """Prints the same on the terminal, whose width no figure is cut for.

    Names and headings are folded, and a table that is still too wide is printed as several, each
    with the names and some of the other columns.
    """
    names, *others = zip(headings, *rows, strict=True)
    widths = [
        max(*map(cell_len, cells), min(_longest_word([heading]), console.width // 3))
        for heading, *cells in others
    ]
    least = max(console.width // 3, min(_longest_word(names), console.width // 2))
    of_names = min(
        max(map(cell_len, names)), max(least, console.width - sum(GAP + w for w in widths))
    )
    blocks, free = [[]], console.width - of_names
    for column, width in enumerate(widths, start=1):
        if blocks[-1] and free < GAP + width:
            blocks, free = [*blocks, []], console.width - of_names
        blocks[-1].append(column)
        free -= GAP + width
    for number, block in enumerate(blocks):
        shown = [of_names, *(widths[column - 1] for column in block)]
        rich = RichTable(**LAYOUT, width=sum(shown) + GAP * len(block))
        for column, width in zip([0, *block], shown, strict=True):
            justify = "right" if column else "left"
            rich.add_column(headings[column], justify=justify, overflow="fold", width=width)
        for row in rows:
            rich.add_row(*(row[column] for column in [0, *block]))
        if number:
            console.print()
        elif title:
            console.print(title)
        console.print(rich)


def _longest_word(texts: Sequence[str]) -> int:
    return max((cell_len(word) for text in texts for word in text.split()), default=0)
