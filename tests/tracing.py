"""What JAX and Flax do for the sake of messages alone, when they trace: the tests leave it out."""

import functools
import threading


def trace_without_notes() -> None:
    """Halves the time that tracing and lowering take; of errors no lines of Python are told."""
    from jax._src import source_info_util
    from jax._src.interpreters import mlir, partial_eval

    # For every program JAX before 0.12 makes a context of MLIR, which takes longer than to fill it
    # does. Later versions keep each for a while, and for one thread.
    of_thread = functools.cache(lambda thread, make=mlir.make_ir_context: make())
    mlir.make_ir_context = lambda: of_thread(threading.get_ident())
    # Flax asks what is traced for its sharding, and for the message of the error that answers JAX
    # looks through all that was traced before.
    partial_eval.DynamicJaxprTracer._origin_msg = lambda tracer: ""
    # For every operation JAX notes which lines of Python led to it, a fifth of what is left.
    source_info_util.current = lambda: source_info_util._source_info_context.context
