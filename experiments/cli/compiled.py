"""What commands compile is kept for their next start."""

import hashlib
import os
import platform
import tempfile
import warnings
from pathlib import Path

import jax
from platformdirs import user_cache_path

CPU_INFO = Path("/proc/cpuinfo")


def keep_compiled() -> None:
    """Has JAX keep what it compiles in the user's cache folder, and read it from there.

    Where JAX's own settings name a folder, it is that one. Where none can be written to, nothing is
    kept.
    """
    # A program of several devices holds addresses in memory, which differ in every process, and
    # beside them what stands there. Without the addresses JAX finds it again.
    if not jax.config.jax_compilation_cache_include_metadata_in_key:  # JAX 0.10.2 fails with both
        jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    try:
        folder = user_cache_path("chansel_jax") / "compiled" / _processor()
        if not folder.is_absolute():  # the user has no home
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # A full disk is met by what matters more.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")


def _processor() -> str:
    """Changes with what the processor can do: a home may be shared by machines that differ.

    JAX does not tell them apart, and would run instructions that one of them lacks.
    """
    described = [platform.machine()]
    if CPU_INFO.exists():
        names = ("model name", "flags", "CPU part", "Features")  # the latter two on ARM
        lines = CPU_INFO.read_text().splitlines()
        described += sorted({line for line in lines if line.startswith(names)})
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
