"""Reports: Markdown with its pictures beside it, and the same as one self-contained HTML page."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.console import Console

from chansel_jax.files import replaced, write_json
from experiments.cli.errors import CommandError
from experiments.reporting import plots
from experiments.reporting.tables import Table, escape, print_table

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
