"""What every test runs under."""

import os

import jax

# Eight devices stand in for a machine with several. On a few cores their threads, waiting for each
# other in a sum over devices, could leave none to compute what they wait for: let there be more.
os.environ.setdefault("PJRT_NPROC", "16")
# Both must be set before anything is computed.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
