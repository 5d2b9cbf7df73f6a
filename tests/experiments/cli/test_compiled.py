"""What commands keep of what they compile."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.cli import compiled
from experiments.cli.compiled import keep_compiled

SCRIPT = """
import collections, jax
from experiments.cli.compiled import keep_compiled
keep_compiled()
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.split("/")[-1]]))
print(jax.jit(lambda x: x + 1)(1.0))
print(events["cache_hits"], events["cache_misses"])
"""


@pytest.fixture
def switches(switches_of_commands):
    """JAX's, as where nobody has set them."""
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", False)


def test_second_process_compiles_nothing(tmp_path):
    own = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    others = {name: value for name, value in os.environ.items() if name not in own}
    environment = others | {"XDG_CACHE_HOME": str(tmp_path)}
    printed = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        for _ in range(2)
    ]
    assert [each.stdout for each in printed] == ["2.0\n0 1\n", "2.0\n1 0\n"]
    assert [each.stderr for each in printed] == ["", ""]
    (folder,) = (tmp_path / "chansel_jax" / "compiled").iterdir()
    assert [path.name for path in folder.glob("jit*-cache")]


def test_folder_of_jax_is_kept(switches, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == "elsewhere" and not list(tmp_path.iterdir())
    assert jax.config.jax_remove_custom_partitioning_ptr_from_cache_key


def test_two_switches_with_which_jax_fails_are_not_set_together(switches):
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    keep_compiled()
    assert not jax.config.jax_remove_custom_partitioning_ptr_from_cache_key


@pytest.mark.parametrize("cache", ["file", "/proc", "relative"])
def test_nothing_is_kept_where_nothing_can_be(switches, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(compiled, "user_cache_path", lambda name: Path(cache, name))
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_processors_have_other_folders(tmp_path, monkeypatch):
    info, folders = tmp_path / "cpuinfo", set()
    monkeypatch.setattr(compiled, "CPU_INFO", info)
    for flags in ("avx2", "avx2 avx512f"):
        info.write_text(f"processor\t: 0\nmodel name\t: One\ncpu MHz\t\t: 1\nflags\t\t: {flags}\n")
        folders.add(compiled._processor())
        info.write_text(f"processor\t: 0\nmodel name\t: One\ncpu MHz\t\t: 2\nflags\t\t: {flags}\n")
        folders.add(compiled._processor())
    assert len(folders) == 2
