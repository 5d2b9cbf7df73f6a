"""What every test runs under."""

import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

gc.disable()  # until all is imported

# What a script starts in the background ignores Ctrl-C, and under `nohup` the end of a terminal: so
# would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# `experiments` is not installed: the processes that tests start find it here, wherever they run.
paths = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
# The tests write thousands of small files, and much faster into memory, where it has room for them.
memory = Path("/dev/shm")
if memory.is_dir() and shutil.disk_usage(memory).free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))
# Two devices stand in for a machine with several; more are in processes of their own. On few cores
# their threads, waiting for each other in a sum over devices, could leave none to compute what they
# wait for: let there be more.
os.environ.setdefault("PJRT_NPROC", "16")
# Compiling is most of what the tests do, and what they compile computes little: LLVM's
# optimisations would cost more than they save. XLA's own are made all the same.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# PyTorch's compiler has little to do too, for which it need not start processes.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# To note for every operation which lines of Python led to it took a tenth of the time.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
if "PYTEST_XDIST_WORKER" not in os.environ:  # pytest-xdist's inherit what is set here
    # Likewise XLA's newer way to compile fused loops, where there is still another, and the
    # compiling of parts beside each other.
    flags = [*os.environ.get("XLA_FLAGS", "").split(), "--xla_cpu_parallel_codegen_split_count=1"]
    jaxlib_version = importlib.metadata.version("jaxlib").split(".")
    if [*map(int, jaxlib_version[:2])] < [0, 11]:  # later ones end at a flag that is unknown
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    # The same functions are compiled for many tests, and in processes of their own too.
    root = os.environ.get("PYTEST_DEBUG_TEMPROOT")
    compiled = tempfile.TemporaryDirectory(prefix="compiled-", dir=root)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY"] = "1"  # as `keep_compiled` does


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: for a third of the time they wait for other processes."""
    return (os.cpu_count() or 1) + 1


def pytest_configure(config):
    if config.getoption("numprocesses", None):
        return  # the processes of pytest-xdist run the tests, and come here too
    import jax
    import torch
    from tracing import trace_without_notes

    trace_without_notes()
    # On a processor without AVX-512, oneDNN's float32 convolutions were off by 7e-4, and with one
    # core wrote beyond their arrays: PyTorch's own are the reference.
    torch.backends.mkldnn.enabled = False
    # Its arrays are small here: further threads would wait for each other, and for other tests.
    torch.set_num_threads(1)
    # Both must be set before anything is computed.
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def initial_parameters_by_numpy():
    """Layers that tests make, and not the processes that they start, have them so."""
    import initial

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial.drawing, "truncated_normal", initial.truncated_normal)
        yield


def pytest_collection_finish():
    # What is imported stays: to look through it for garbage, again and again, takes long.
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()
