"""Builds the package with setuptools, and the library of handlers.cc if it can be compiled.

pyproject.toml names this file; it is used by pip alone. That the library is missing is no error:
its extension is declared optional there.
"""

import importlib.util
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403  the hooks that pip calls
from setuptools.command.build_ext import build_ext


class BuildNative(build_ext):
    """Compiles as C++17 against the headers that jaxlib brings."""

    def build_extension(self, extension) -> None:
        headers = Path(importlib.util.find_spec("jaxlib").origin).parent / "include"
        extension.extra_compile_args += ["-std=c++17", "-O3", "-isystem", str(headers)]
        self.force = True  # jaxlib's headers may have changed where the sources have not
        super().build_extension(extension)
