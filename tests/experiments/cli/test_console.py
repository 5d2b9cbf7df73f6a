"""What commands print to."""

import errno
import io
import subprocess
import sys

import jax
import pytest

from experiments.cli.console import make_console, print_any_character
from experiments.reporting.tables import print_table

UNREAD = """
import sys
from experiments.cli.console import make_console
console = make_console()
for i in range(100):
    console.print("x" * 1000)  # in all more than a pipe holds
print("done", file=sys.stderr)
"""


def test_that_nobody_reads_what_is_printed_ends_nothing():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", UNREAD], **pipes, text=True) as process:
        assert process.stdout.readline() == "x" * 1000 + "\n"
        process.stdout.close()
        assert process.stderr.read() == "done\n"
    assert process.returncode == 0


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fileno(self):
        return self.descriptor


def test_a_full_disk_behind_what_is_printed_ends_nothing(monkeypatch, capsys, tmp_path):
    full = Full()
    with (tmp_path / "log").open("w") as log:
        full.descriptor = log.fileno()
        monkeypatch.setattr(sys, "stdout", full)
        console = make_console()
        console.print("first")
        console.print("second")
    told = "note: nothing more is printed (No space left on device)\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("name", ["[x]", "[/x]", "[red]cat[/red]", ":cat:", "a\\[b]"])
def test_names_are_printed_as_they_are(capsys, name):
    make_console().print(f"run: {name}")
    print_table([name, "images"], [[name, "3"]], make_console())
    heading, _, row = capsys.readouterr().out.removeprefix(f"run: {name}\n").splitlines()
    assert heading.split() == [name, "images"] and row.split() == [name, "3"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_does_not_have_ends_nothing(monkeypatch, encoding):
    """Dashes, other scripts, and the names of files that are not UTF-8."""
    text, written = "caf\xe9 \u2013 \u732b \udce9", io.BytesIO()
    with io.TextIOWrapper(written, encoding) as output:
        monkeypatch.setattr(sys, "stdout", output)
        print_any_character()
        print_table([text, "images"], [[text, "3"]], make_console())
        output.flush()
        assert text.encode(encoding, "backslashreplace") in written.getvalue()


def test_only_process_0_prints(monkeypatch, capsys):
    make_console().print("first")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    make_console().print("second")
    assert capsys.readouterr().out == "first\n"
