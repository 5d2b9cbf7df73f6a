"""Reports: Markdown with its pictures beside it, and the same as one self-contained HTML page."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable

from chansel_jax.files import replaced, write_json
from experiments.cli.errors import CommandError
from experiments.reporting import plots

# Headings and rows.
Table = tuple[Sequence[str], Sequence[Sequence[str]]]

# As much as fits into 80 columns; GAP is the blanks between two of a table's.
LAYOUT = {"box": SIMPLE, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
GAP = 2
# What Markdown would not show as it is; between letters an underscore means nothing to it.
MARKDOWN = re.compile(r"[\\`*<\[|~]|&(?=[#\w])|(?<![^\W_])_|_(?![^\W_])")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ccc; text-align: left }
img { max-width: 100% }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto }
"""


def write(folder: Path, title: str, text: str, pictures: Mapping[str, Figure]) -> None:
    """Replaces `report.md`, `report.html` and the PNG files in `folder`, each at once.

    Args:
        folder: which is there.
        title: of the page.
        text: Markdown; `![caption](NAME.png)` shows the one `NAME` of `pictures`.
        pictures: by name.
    """
    for name, picture in pictures.items():
        plots.save(picture, folder / f"{name}.png")
    for name, content in (
        ("report.md", f"# {escape(title)}\n\n{text}"),
        ("report.html", page(folder, title, text)),
    ):
        with replaced(folder / name) as partial:
            partial.write_text(content, encoding="utf-8")


def publish(
    folder: Path,
    title: str,
    text: str,
    pictures: Mapping[str, Figure],
    results: Mapping[str, Any],
    tables: Sequence[Table],
    console: Console,
    left_out: Sequence[str] = (),
) -> None:
    """Writes `results.json` and the report, and prints its tables.

    Raises:
        CommandError: if something is left out, when all else is done; the report names it too.
    """
    write_json(folder / "results.json", results)
    missing = "".join(f"\n\nNot in the table: {line}." for line in left_out)
    write(folder, title, text + missing, pictures)
    console.print()
    for headings, rows in tables:
        print_table(headings, rows, console)
    console.print(f"the results are written to {folder}")
    if left_out:
        raise CommandError("; ".join(left_out))


def page(folder: Path, title: str, text: str) -> str:
    """The Markdown `text` as HTML that holds the pictures of `folder` in itself."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)

    def embedded(match: re.Match) -> str:
        picture = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{picture}"'

    body = re.sub(r'src="([^":/]+\.png)"', embedded, body)
    heading = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{heading}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{heading}</h1>\n{body}</html>\n"
    )


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
