import dataclasses
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """The default folder for prepared data sets, away from the user's own."""
    path = tmp_path / "cache"
    monkeypatch.setenv("TFDS_DATA_DIR", str(path))
    return path


@dataclasses.dataclass
class Server:
    """Answers every request alike; what it answers can be set at any time."""

    url: str
    body: bytes = b""
    status: int = 200
    announced: int | None = None  # a Content-Length that differs from the body's
    requests: int = 0


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests += 1
            self.send_response(state.status)
            length = len(state.body) if state.announced is None else state.announced
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        state = Server(f"http://127.0.0.1:{httpd.server_port}/images.tar.gz")
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        httpd.shutdown()
        thread.join()


@pytest.fixture
def write_images():
    """Writes random PNG files, `counts[folder]` of them; returns the arrays by path."""

    def write(root: Path, counts: dict[str, int], size=(8, 8)) -> dict[Path, np.ndarray]:
        rng = np.random.default_rng(0)
        arrays = {}
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                path = root / folder / f"{i:02}.png"
                arrays[path] = rng.integers(0, 256, (*size, 3), np.uint8)
                Image.fromarray(arrays[path]).save(path)
        return arrays

    return write
