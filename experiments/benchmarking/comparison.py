"""Whether contestants compute the same: what is timed is compared first."""

from collections.abc import Mapping, Sequence

import numpy as np

from chansel_jax.errors import OneLineError
from experiments.benchmarking.cases import Case, Contestant
from experiments.benchmarking.contestants.runner import FIRST_UPDATE

Outputs = Mapping[str, np.ndarray]

# The largest relative difference, by dtype. In a deep network a pre-activation that is zero but for
# rounding flips its ReLU and with it the gradient there; AdamW's first update is the gradient's
# sign. So gradients agree less well than outputs, updates less than gradients. Arrays that have
# nothing to do with each other differ by 1.4, one that is missing by 1.
OUTPUT_TOLERANCES = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 5e-2}
GRADIENT_TOLERANCES = {"float32": 0.1, "tf32": 0.5, "bfloat16": 0.9}
UPDATE_TOLERANCES = {"float32": 0.3, "tf32": 0.9, "bfloat16": 0.95}

# A parameter whose gradient is zero but for rounding (the scale of a 1 × 1 depthwise kernel before
# BatchNorm) is compared on the scale of all gradients, this part of it.
GRADIENT_FLOOR = 0.01


class MismatchError(OneLineError):
    """Two contestants do not compute the same."""


def check_outputs(case: Case, outputs: Mapping[Contestant, Outputs]) -> dict[Contestant, float]:
    """Compares every contestant with the first of its convolution.

    Returns:
        The largest part of its tolerance that a contestant needs, 0 for one that is compared with
        itself.

    Raises:
        MismatchError: naming the two contestants that differ, in what and by how much.
    """
    needed = {}
    for conv in dict.fromkeys(contestant.conv for contestant in outputs):
        reference, *_ = alike = [contestant for contestant in outputs if contestant.conv == conv]
        for contestant in alike:
            if outputs[contestant].keys() != outputs[reference].keys():
                raise MismatchError(f"{contestant.name} and {reference.name} differ in outputs")
            differences = relative_differences(outputs[contestant], outputs[reference])
            shares = {name: d / tolerance(case, name) for name, d in differences.items()}
            # NaN compares as False, and must not pass.
            wrong = [name for name, share in shares.items() if not share <= 1]
            if wrong:
                name = wrong[0]
                raise MismatchError(
                    f"{case.title}: {contestant.name} and {reference.name} differ in {name} by "
                    f"{differences[name]:.2g}, more than {tolerance(case, name):.2g} of its norm"
                    + (f" (and in {len(wrong) - 1} more outputs)" if len(wrong) > 1 else "")
                )
            needed[contestant] = max(shares.values())
    return needed


def tolerance(case: Case, name: str) -> float:
    """The largest relative difference of the output `name`."""
    if case.layer is None and name == FIRST_UPDATE:
        return UPDATE_TOLERANCES[case.dtype]
    if case.layer is None and name.startswith("gradient"):
        return GRADIENT_TOLERANCES[case.dtype]
    return OUTPUT_TOLERANCES[case.dtype]


def relative_differences(actual: Outputs, expected: Outputs) -> dict[str, float]:
    """Euclidean norm of the difference over that of `expected`, by name; NaN where shapes differ.

    Gradients are compared on a scale of at least `GRADIENT_FLOOR` times that of all of them.
    """
    gradients = [array for name, array in expected.items() if name.startswith("gradient")]
    floor = GRADIENT_FLOOR * _norm(gradients)
    differences = {}
    for name, array in expected.items():
        scale = max(_norm([array]), floor if name.startswith("gradient") else 0.0, 1e-30)
        fits = actual[name].shape == array.shape
        differences[name] = _norm([actual[name] - array]) / scale if fits else float("nan")
    return differences


def _norm(arrays: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays)))
