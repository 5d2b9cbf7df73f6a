"""Which lowering is the fastest, where: what `lowering="auto"` chooses.

Three short tables of rules; the first rule that applies decides. Every rule names the measurement
that it follows from; `python -m experiments.tune` measures again on the machine at hand.
"""

import dataclasses
from collections.abc import Callable

import jax

from chansel_jax.ops import native


@dataclasses.dataclass(frozen=True)
class Case:
    """What a choice may depend on, besides the backend.

    Attributes:
        dtype: of the computation.
        in_channels: of `x`: C_in, or C_out·R for the depthwise part alone.
        out_channels: C_out.
        rank: R.
    """

    dtype: str
    in_channels: int
    out_channels: int
    rank: int

    @classmethod
    def of(cls, x: jax.Array, depthwise: jax.Array) -> "Case":
        """That of `x` `(N, H, W, C)` and the depthwise kernel `(K_h, K_w, R, C_out)`."""
        return cls(str(x.dtype), x.shape[3], depthwise.shape[3], depthwise.shape[2])

    @classmethod
    def of_dense(cls, kernel: jax.Array) -> "Case":
        """That of the dense kernel `(K_h, K_w, C_in, C_out)`, of the dtype of `x`."""
        return cls(str(kernel.dtype), kernel.shape[2], kernel.shape[3], rank=1)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A lowering, when it is chosen, and the measurement behind it."""

    lowering: str
    applies: Callable[[Case], bool]
    measured: str


NATIVE = ("native", "composed_native")  # in C++

# Weights of the pointwise part from which on the matrix products decide, where XLA is the faster,
# by instruction set.
WIDE = {"avx512": 256 * 256, "avx2": 64 * 64, "baseline": 0}


def native_on_one_cpu(case: Case) -> bool:
    """Whether the native lowering can run here, and nothing is sharded."""
    return (
        on_cpu(case)
        and jax.device_count() == 1
        and case.dtype in native.DTYPES
        and native.available()
    )


def measured_dense_on_one_cpu(case: Case) -> bool:
    """Whether, besides, it is of float32, at most 128→128, with vectors longer than 16 bytes."""
    return (
        native_on_one_cpu(case)
        and case.dtype == "float32"
        and case.in_channels * case.out_channels <= 128 * 128
        and native.instruction_set() != "baseline"
    )


def narrow_on_one_cpu(case: Case) -> bool:
    """Whether the native lowering can run here, nothing is sharded, and the layer is not wide."""
    return (
        native_on_one_cpu(case)
        and case.in_channels * case.out_channels * case.rank < WIDE[native.instruction_set()]
    )


def many_ranks_on_one_cpu(case: Case) -> bool:
    """Whether the native dense lowering can run here, was measured, and the ranks are many."""
    return case.rank > max(2, case.in_channels // 16) and measured_dense_on_one_cpu(case)


def on_cpu(case: Case) -> bool:
    """Whether JAX computes on CPUs."""
    return jax.default_backend() == "cpu"


def everywhere(case: Case) -> bool:
    """Always."""
    return True


# The milliseconds are those of forward and backward at batch 128 in float32, on two cores of an
# AMD EPYC with AVX-512, jax 0.10.2: `taskset -c 0,1 python -m experiments.tune`.
LAYER_RULES = (
    Rule(
        "composed_native",
        many_ranks_on_one_cpu,
        "Its work does not grow with the rank. On one core of an EPYC with AVX2, 32 images, beside "
        "another program: 32² 16→16 of rank 2: 10 against 9.4 native, 17 shifted; of rank 4: 12, "
        "17, 44; of rank 9: 12, 54, 225; 16² 32→32 of rank 4: 11, 14, 24; 8² 64→64 of rank 4: 15, "
        "10, 15; of rank 9: 16, 25, 44.",
    ),
    Rule(
        "native",
        narrow_on_one_cpu,
        "32² 16→16: 2.6 against 4.1 shifted, 12 composed, 83 grouped; 8² 64→64: 1.5 against 2.5, "
        "11, 17; 28² 128→128: 42 against 60, 509, 687. From 256→256 on it gains nothing (38, 38; "
        "7² 512→512: 45, 30). With AVX2 alone that is so from 64→64 on (32² 16→16: 3.6 against 4.4 "
        "shifted; 8² 64→64: 1.9, 1.8), and with neither, shifted is the faster everywhere (8.2, "
        "6.1; 4.9, 2.2). In bfloat16, on an older EPYC with AVX2, 32² 16→16: 12 against 28 "
        "shifted, 111 composed; 224² 3→64, 7×7: 186, 328, 434; 28² 128→128: 194, 228; from 256→256 "
        "on it gains nothing (221, 217). Over several devices XLA cannot split it.",
    ),
    Rule(
        "shifted",
        on_cpu,
        "Without the native one it is the fastest for every shape but the stem of ResNet-18 (224² "
        "3→64, 7×7: 99, composed 75).",
    ),
    Rule(
        "composed",
        everywhere,
        "By construction as fast as the dense convolution; not measured on other devices yet.",
    ),
)

DEPTHWISE_RULES = (
    Rule(
        "shifted",
        on_cpu,
        "32² 16→16: 2.8 against 89 grouped; 8² 64→64: 1.1 against 25; 7² 512→512: 7.6 against 260.",
    ),
    Rule("grouped", everywhere, "What other backends have kernels for; not measured there yet."),
)

DENSE_RULES = (
    Rule(
        "native",
        measured_dense_on_one_cpu,
        "On one core of an older EPYC with AVX2, 64 images: 32² 16→16: 27 against 55 lax; 32² "
        "32→32: 105, 410; 8² 64→64: 29, 32; 8² 128→128: 101, 124; 56² 64→64: 1,270, 2,370. With "
        "the baseline's vectors it gains nothing (32 images, 32² 16→16: 27, 26; 8² 64→64: 27, "
        "15). Other dtypes and AVX-512 have not been measured.",
    ),
    Rule("lax", everywhere, "Everywhere else."),
)


def checked_lowering(lowering: str, choices: tuple[str, ...]) -> str:
    """`lowering` if it is one of `choices` and can run here.

    Raises:
        ValueError: if not, naming the choices or what is missing.
    """
    if lowering not in choices:
        names = ", ".join(map(repr, choices))
        raise ValueError(f"lowering={lowering!r} must be one of {names}")
    if lowering in NATIVE and not native.available():
        raise ValueError(f"lowering={lowering!r}: {native.why_not()}")
    return lowering


def runnable(choices: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `choices` that can run here; without those in C++, if they are not there."""
    native_runs = jax.default_backend() == "cpu" and native.available()
    return tuple(choice for choice in choices if choice not in NATIVE or native_runs)


def fastest_layer(case: Case) -> str:
    """The lowering that `channel_selection` takes for `"auto"`."""
    return first_that_applies(LAYER_RULES, case)


def fastest_depthwise(case: Case) -> str:
    """The lowering that `depthwise_conv` takes for `"auto"`."""
    return first_that_applies(DEPTHWISE_RULES, case)


def fastest_dense(case: Case) -> str:
    """The lowering that `dense_conv` takes for `"auto"`."""
    return first_that_applies(DENSE_RULES, case)


def first_that_applies(rules: tuple[Rule, ...], case: Case) -> str:
    """The lowering of the first rule that applies to `case`."""
    return next(rule.lowering for rule in rules if rule.applies(case))
