import contextlib
import hashlib
import io
import os
import socket
import sys

import pytest
import requests

from chansel_jax.data import DataError
from chansel_jax.data.download import download

CONTENT = os.urandom(3_000_000)  # of several blocks
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "downloads"


@pytest.fixture
def url(server):
    server.body = CONTENT
    return server.url


def names_in(folder):
    return [path.name for path in folder.rglob("*")]


def test_file_is_fetched_once(server, url, folder, tmp_path):
    path = download(url, CHECKSUM, folder)
    assert path.read_bytes() == CONTENT
    assert names_in(folder) == [path.name]
    assert download(url, CHECKSUM, folder) == path
    assert server.requests == 1


def test_others_may_read_it(url, folder, tmp_path):
    (tmp_path / "written").write_bytes(b"")
    path = download(url, CHECKSUM, folder)
    assert path.stat().st_mode == (tmp_path / "written").stat().st_mode


def test_kept_file_that_has_been_damaged_is_replaced(server, url, folder):
    path = download(url, CHECKSUM, folder)
    path.write_bytes(CONTENT[::-1])
    assert download(url, CHECKSUM, folder).read_bytes() == CONTENT
    assert server.requests == 2


def cut_short(server):
    server.announced = len(server.body)
    server.body = server.body[: len(server.body) // 2]


def changed(server):
    server.body = server.body[:-1] + bytes([server.body[-1] ^ 1])


def not_found(server):
    server.status = 404


def failing(server):
    server.status = 500


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(cut_short, ""), (changed, "its SHA-256 is "), (not_found, "404"), (failing, "500")],
)
def test_refused_file_leaves_nothing(server, url, folder, fault, reason):
    fault(server)
    with pytest.raises(DataError, match=f"{url}.*{reason}") as error:
        download(url, CHECKSUM, folder)
    assert "\n" not in str(error.value)
    assert names_in(folder) == []


def test_no_connection(folder, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/images.tar.gz"
    with pytest.raises(DataError, match=f"^cannot download {url}: ") as error:
        download(url, CHECKSUM, folder)
    assert "\n" not in str(error.value)
    assert names_in(folder) == []


def test_interruption_leaves_nothing(url, folder, monkeypatch):
    def interrupted(*_):
        yield b"begun"
        raise KeyboardInterrupt

    monkeypatch.setattr(requests.Response, "iter_content", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(url, CHECKSUM, folder)
    assert names_in(folder) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_where_there_is_a_terminal(url, folder, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    download(url, CHECKSUM, folder)
    shown = sys.stderr.getvalue()
    assert "images.tar.gz" in shown and "100%" in shown and "3.0/3.0 MB" in shown
    assert capsys.readouterr().out == ""


def test_nothing_is_shown_where_there_is_no_terminal(url, folder, capfd):
    download(url, CHECKSUM, folder)
    assert capfd.readouterr() == ("", "")
