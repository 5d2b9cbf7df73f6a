"""Initial parameters drawn by NumPy: for every shape of them JAX would compile a program."""

import jax
import numpy as np
import scipy.special

# Where initialisers find what they draw with.
drawing = jax.nn.initializers.variance_scaling.__globals__["random"]
by_jax = drawing.truncated_normal


class Drawn(np.ndarray):
    """What initialisers multiply, which is to compile nothing either."""

    def __mul__(self, scale):
        product = np.asarray(self) * np.asarray(scale)
        return jax.device_put(product.astype(self.dtype))


def truncated_normal(key, lower, upper, shape, dtype, **how):
    """As `jax.random.truncated_normal`: of the same distribution, and decided by the key."""
    if isinstance(key, jax.core.Tracer):
        return by_jax(key, lower, upper, shape, dtype, **how)
    ends = scipy.special.ndtr((lower, upper))
    rng = np.random.default_rng(np.ravel(jax.random.key_data(key)))
    return scipy.special.ndtri(rng.uniform(*ends, shape)).astype(dtype).view(Drawn)
