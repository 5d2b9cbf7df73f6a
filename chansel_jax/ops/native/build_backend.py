"""Builds the package with setuptools, and the library of handlers.cc if it can be compiled.

pyproject.toml names this file; it is used by pip alone. That the library is missing is no error:
its extension is declared optional there.
"""

import importlib.util
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403  the hooks that pip calls
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildNative(build_ext):
    """Compiles as C++17 against the headers that jaxlib brings."""

    def get_ext_filename(self, fullname: str) -> str:
        # ctypes loads it: no version of Python in its name, which a module's would have.
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, extension) -> None:
        headers = Path(importlib.util.find_spec("jaxlib").origin).parent / "include"
        # -g0: what a debugger reads would be seven eighths of the library.
        extension.extra_compile_args += ["-std=c++17", "-O3", "-g0", "-isystem", str(headers)]
        self.force = True  # jaxlib's headers may have changed where the sources have not
        super().build_extension(extension)


class BuildWheel(bdist_wheel):
    """One wheel for all versions of Python, and for any platform if it has no library."""

    def get_tag(self) -> tuple[str, str, str]:
        [library] = self.get_finalized_command("build_ext").get_outputs()
        return "py3", "none", super().get_tag()[2] if Path(library).exists() else "any"
