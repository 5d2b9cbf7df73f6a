"""The window's geometry against XLA's, and the spellings of its arguments."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from chansel_jax.ops.window import Window, kernel_sizes, padding_spec, per_axis, positive


def pairs(low: int, high: int):
    return st.tuples(st.integers(low, high), st.integers(low, high))


paddings = st.one_of(
    st.sampled_from(["SAME", "SAME_LOWER", "VALID"]),
    st.tuples(pairs(-1, 4), pairs(-1, 4)),
    st.integers(-1, 4),
)


names = st.sampled_from(["SAME", "SAME_LOWER", "VALID"])


def xla_output_size(size, kernel_size, strides, padding, dilation, input_dilation=(1, 1)):
    """The shape XLA gives an image of `size` convolved with a kernel of `kernel_size`."""
    convolve = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        lhs_dilation=input_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    image = jax.ShapeDtypeStruct((1, *size, 1), jnp.float32)
    kernel = jax.ShapeDtypeStruct((*kernel_size, 1, 1), jnp.float32)
    return jax.eval_shape(convolve, image, kernel).shape[1:3]


@settings(deadline=None, max_examples=200)
@given(pairs(3, 20), pairs(1, 7), pairs(1, 4), paddings, pairs(1, 3), pairs(1, 3))
def test_output_size_is_that_of_xla(size, kernel_size, strides, padding, dilation, input_dilation):
    if isinstance(padding, str):
        input_dilation = (1, 1)
    spec = padding_spec(padding)
    expected = xla_output_size(size, kernel_size, strides, spec, dilation, input_dilation)
    window = Window.of(strides, padding, dilation, input_dilation)
    if min(expected) < 1:
        with pytest.raises(ValueError, match="is smaller than"):
            window.output_size(size, kernel_size)
    else:
        assert window.output_size(size, kernel_size) == expected


@settings(deadline=None, max_examples=100)
@given(pairs(1, 20), pairs(1, 7), pairs(1, 4), names, pairs(1, 3))
def test_named_paddings_are_the_pairs_they_stand_for(size, kernel_size, strides, name, dilation):
    pads = Window.of(strides, name, dilation).padding_pairs(size, kernel_size)
    window = Window.of(strides, pads, dilation)
    assert window.padding_pairs(size, kernel_size) == pads
    expected = xla_output_size(size, kernel_size, strides, name, dilation)
    assume(min(expected) >= 1)
    assert window.output_size(size, kernel_size) == expected


@given(*[st.integers(-50, 50)] * 4)
def test_spellings_of_a_padding(top, bottom, left, right):
    assert padding_spec(top) == ((top, top), (top, top))
    assert padding_spec((top, left)) == ((top, top), (left, left))
    assert padding_spec([top, (left, right)]) == ((top, top), (left, right))
    assert padding_spec([[top, bottom], [left, right]]) == ((top, bottom), (left, right))
    assert padding_spec([[top, bottom]], 1) == ((top, bottom),)
    assert padding_spec(top, 3) == ((top, top),) * 3


def test_same_with_stride_2_is_not_padding_1():
    same, one = Window.of(2, "SAME"), Window.of(2, 1)
    assert same.padding_pairs((32, 32), (3, 3)) == ((0, 1), (0, 1))
    assert one.padding_pairs((32, 32), (3, 3)) == ((1, 1), (1, 1))
    assert same.output_size((32, 32), (3, 3)) == one.output_size((32, 32), (3, 3)) == (16, 16)


def test_a_window_has_one_form_whatever_it_was_spelled_like():
    assert Window.of(2, [1, 0]) == Window((2, 2), ((1, 1), (0, 0)), (1, 1), (1, 1))
    assert Window.of() == Window((1, 1), "SAME", (1, 1), (1, 1))
    assert Window.of(None, "same", None, None) == Window.of()
    assert Window.of(dimensions=3) == Window((1,) * 3, "SAME", (1,) * 3, (1,) * 3)
    assert hash(Window.of([1, 2])) == hash(Window.of((1, 2)))


@pytest.mark.parametrize(
    "wrong", [{"strides": 0}, {"padding": 0.5}, {"dilation": (1,)}, {"input_dilation": 0}]
)
def test_a_wrong_window_names_the_argument(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        Window.of(**wrong)


def test_an_integer_stands_for_rows_and_columns():
    assert per_axis("strides", 2) == (2, 2)
    assert per_axis("strides", [1, 2]) == (1, 2)


@pytest.mark.parametrize("value", [0, -1, 1.0, "3", None, True, (1,), (1, 2, 3), (1, 0), (1, 2.0)])
def test_wrong_pair(value):
    with pytest.raises(ValueError) as error:
        per_axis("strides", value)
    assert f"strides={value!r}" in str(error.value)


@pytest.mark.parametrize("value", [0, -3, 1.0, "3", None, True, (1,)])
def test_wrong_positive(value):
    with pytest.raises(ValueError) as error:
        positive("in_channels", value)
    assert f"in_channels={value!r}" in str(error.value)


@pytest.mark.parametrize(
    "value", ["SOME", "CAUSAL", 1.0, None, True, (1,), (1, 2, 3), (0.5, 0), ((1, 2), (3,))]
)
def test_wrong_padding(value):
    with pytest.raises(ValueError) as error:
        padding_spec(value)
    assert f"padding={value!r}" in str(error.value)


def test_image_smaller_than_the_kernel():
    with pytest.raises(ValueError, match=r"\(H, W\)=\(4, 9\).*kernel_size=\(3, 3\)"):
        Window.of(1, "VALID", 2).output_size((4, 9), (3, 3))


def test_a_kernel_size_says_the_number_of_dimensions():
    assert kernel_sizes(3) == kernel_sizes([3]) == (3,)
    assert kernel_sizes((2, 5)) == (2, 5)


def test_named_paddings_do_not_go_with_a_dilated_input():
    with pytest.raises(ValueError, match="padding='VALID'.*input_dilation=2"):
        Window.of(padding="VALID", input_dilation=2)
