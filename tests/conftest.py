"""What every test runs under."""

import jax

# Both must be set before anything is computed. Eight devices stand in for a machine with several.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
