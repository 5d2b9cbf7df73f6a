"""Dense kernels as sums of channel selections, by singular values.

The kernel of one output channel, as a matrix `(C_in/G, K)` for its K elements, is a sum of outer
products: of its singular vectors, weighted with its singular values. Each is a channel selection.
The R leading ones are the best sum of R in the Frobenius norm (Eckart and Young, 1936), and all of
them, R = min(C_in/G, K), are the kernel itself. Guo et al., "Network Decoupling" (2018), decompose
trained networks so; Haase and Amthor (CVPR 2020) report how much the first component holds.

The energy of a component is its squared singular value.
"""

import numpy as np

from chansel_jax.ops.window import is_int


def factorize_kernel(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Both parts of the best channel selection of `rank` for a dense kernel, in float64.

    Args:
        kernel: `(*kernel_size, C_in/G, C_out)`, of any number of spatial axes.
        rank: R, from 1 to min(C_in/G, K), where K is the number of elements of `kernel_size`.

    Returns:
        The pointwise kernel `(C_in/G, C_out·R)` and the depthwise one `(*kernel_size, R, C_out)`;
        each has the square root of a component's singular value.

    Raises:
        ValueError: if `rank` is not an integer in this range, or `kernel` holds what is not finite
            or not real.
    """
    *kernel_size, in_channels, out_channels = kernel.shape
    matrices = _matrices(kernel)
    most = min(matrices.shape[1:])
    if not is_int(rank) or not 1 <= rank <= most:
        raise ValueError(f"rank={rank!r} must be from 1 to min(C_in/G, K) = {most}")
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    roots = np.sqrt(values[:, :rank])
    # (C_out, C_in/G, R) and (C_out, R, K).
    left, right = left[:, :, :rank] * roots[:, None], right[:, :rank] * roots[:, :, None]
    pointwise = left.transpose(1, 0, 2).reshape(in_channels, out_channels * rank)
    depthwise = right.transpose(2, 1, 0).reshape(*kernel_size, rank, out_channels)
    return pointwise, depthwise


def component_energies(kernel: np.ndarray) -> np.ndarray:
    """The share of a dense kernel's energy in each component, the largest first.

    Args:
        kernel: `(*kernel_size, C_in/G, C_out)`, of any number of spatial axes.

    Returns:
        `(min(C_in/G, K),)` float64: squared singular values, added up over the output channels,
        over the squared norm. A kernel of zeros has all of its energy in the first.

    Raises:
        ValueError: if `kernel` holds a value that is not finite or real.
    """
    values = np.linalg.svd(_matrices(kernel), compute_uv=False)
    energies = (values**2).sum(axis=0)
    total = energies.sum()
    return energies / total if total > 0 else np.eye(1, len(energies))[0]


def _matrices(kernel: np.ndarray) -> np.ndarray:
    """`(C_out, C_in/G, K)` float64, a matrix for each output channel."""
    *_, in_channels, out_channels = kernel.shape
    if np.iscomplexobj(kernel):
        raise ValueError(f"a kernel of shape {kernel.shape} is complex, and factors are real")
    matrices = np.asarray(kernel, np.float64).reshape(-1, in_channels, out_channels)
    if not np.isfinite(matrices).all():
        raise ValueError(f"a kernel of shape {kernel.shape} holds values that are not finite")
    return matrices.transpose(2, 1, 0)
