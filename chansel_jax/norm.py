"""Batch normalisation as a layer that takes `flax.nnx.BatchNorm`'s place."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from chansel_jax.ops.moments import Moments, finding_moments
from chansel_jax.ops.native import EXACT_DTYPES
from chansel_jax.ops.norm import batch_norm

USUAL_DTYPES = {"float16", "bfloat16", "float32", "float64"}


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`, that adds a residual and applies ReLU in the same pass.

    It is constructed as that is, and has the same parameters, statistics and modes. While it trains
    it computes by `chansel_jax.ops.norm.batch_norm`, on CPUs in C++, wherever that has what is
    asked for: channels last, scale and bias, no `mask`, no `axis_name`, the fast variance and the
    promotion of dtypes that are the default. For all else, and with running averages, it is Flax's.
    """

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        relu: bool = False,
        moments: Moments | None = None,
    ) -> jax.Array:
        """`(..., C)` to the same, normalised, plus `residual`, then ReLU.

        Args:
            x: `(..., C)`.
            use_running_average: takes the place of the layer's own, if it is not None.
            mask: of the positions that count for the statistics; as Flax's.
            residual: of the shape of `x`; it is cast to the dtype of what it is added to. By
                default nothing is added.
            relu: whether ReLU follows. Default False.
            moments: mean and variance of `x` by `with_moments`, where they are known.

        Raises:
            ValueError: if `residual` has another shape, or neither the call nor the layer says
                whether it uses running averages.
        """
        if residual is not None and residual.shape != x.shape:
            raise ValueError(f"residual of shape {residual.shape} must be of the {x.shape} of x")
        averages = self.use_running_average if use_running_average is None else use_running_average
        if averages is not None and not averages and mask is None and self._is_usual(x):
            return self._by_batch(x, residual, relu, moments)
        y = super().__call__(x, averages, mask=mask)
        if residual is not None:
            y = y + residual.astype(y.dtype)
        return nnx.relu(y) if relu else y

    @property
    def takes_moments(self) -> bool:
        """Whether mean and variance of its input, by `with_moments`, are of use as it is now."""
        exact = self.dtype is None or str(jnp.dtype(self.dtype)) in EXACT_DTYPES
        return self.use_running_average is False and self._is_usual_layer() and exact

    def _is_usual_layer(self) -> bool:
        return (
            self.scale is not None
            and self.bias is not None
            and self.axis_name is None
            and self.use_fast_variance
            and self.promote_dtype is dtypes.promote_dtype
            and isinstance(self.epsilon, float | int)
        )

    def _is_usual(self, x: jax.Array) -> bool:
        return (
            self._is_usual_layer()
            and self.axis in (-1, x.ndim - 1)
            and x.ndim > 1
            and x.size > 0
            and {str(x.dtype), str(self.scale.dtype)} <= USUAL_DTYPES
        )

    def _by_batch(
        self,
        x: jax.Array,
        residual: jax.Array | None,
        relu: bool,
        moments: Moments | None,
    ) -> jax.Array:
        variables = (each[...] for each in (self.mean, self.var, self.scale, self.bias))
        moments_dtype = x.dtype
        # As Flax does, for the dtypes of the statistics count too.
        x, _, _, scale, bias = self.promote_dtype((x, *variables), dtype=self.dtype)
        if residual is not None:
            residual = residual.astype(x.dtype)
        known = moments if x.dtype == moments_dtype else None
        y, *found = batch_norm(
            x, scale, bias, residual, relu=relu, epsilon=self.epsilon, moments=known
        )
        for average, of_batch in zip((self.mean, self.var), found, strict=True):
            kept = self.momentum * average[...]
            average[...] = jax.lax.stop_gradient(kept + (1 - self.momentum) * of_batch)
        return y


def with_moments(
    norm: nnx.Module | None, convolve: Callable[[jax.Array], jax.Array], x: jax.Array
) -> tuple[jax.Array, Moments | None]:
    """`convolve(x)`, and its mean and variance, if `norm` behind it will take them.

    So a convolution in C++ computes them while its output is in cache:

        y, moments = with_moments(norm, conv, x)
        y = norm(y, relu=True, moments=moments)

    Args:
        norm: any layer, or None; what is no `BatchNorm` of ours, or does not train, takes none.
        convolve: a layer of `chansel_jax.conv`, or what ends with one; all others have none.
        x: its input.
    """
    # A subclass may change what it is given.
    if type(norm) is not BatchNorm or not norm.takes_moments:
        return convolve(x), None
    with finding_moments() as found:
        y = convolve(x)
    return y, next((moments for output, moments in found if output is y), None)
