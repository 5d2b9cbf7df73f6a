"""How much a step has to compute and to move, from shapes alone.

Multiply-adds are those of `chansel_jax.counting`: channel selection counts as its two parts,
whichever way it is computed (a composed kernel really takes those of the dense layer). A training
step takes three times those of a forward pass: forward, the gradient of the input and the gradient
of the weights are products of one size.

Bytes are a model of what cannot be kept in a cache: each of these three products touches one array
of its layer's input's size and one of its output's, once. Summed over a network, where the output
of one layer is the input of the next, that is 2 · A · s bytes for each of them, with A the elements
of all layers' outputs (BatchNorm included; ReLU and residual sums taken as part of it) and s the
bytes of an element. Parameters are float32 and read once forward; a training step with AdamW reads
them again in the backward pass, writes and reads the gradient, and reads and writes parameter and
two moments: 10 · 4 bytes each. A single layer's are touched once a product.
"""

import dataclasses
import math

from chansel_jax.counting import chansel_cost, count_network, subkernel_cost
from chansel_jax.networks.resnet import CONVS, PRESETS, ResNetConfig
from experiments.benchmarking.cases import Case, conv_and_width

ELEMENT_BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2}
PARAMETER_BYTES = 4
PASSES = {"forward": 1, "step": 3, "epoch": 3}
TOUCHES = {"forward": 1, "step": 10, "epoch": 10}


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one step: a batch."""

    parameters: int
    multiply_adds: int
    bytes_moved: int


def work_of(case: Case, conv: str) -> Work:
    """What one step of `case` takes; in an epoch too, one of its steps."""
    layer = case.layer
    if layer is None:
        rows = count_network(network_config(case, conv), case.image_size)
        passes, touches = PASSES[case.what], TOUCHES[case.what]
        parameters = sum(row.parameters for row in rows)
        multiply_adds = sum(row.multiply_adds for row in rows)
        elements = 2 * sum(math.prod(row.output) for row in rows)
    else:
        passes = touches = 3 if case.backward else 1
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
        given = {"output_size": layer.output_size, "use_bias": False}
        parameters, multiply_adds = (
            chansel_cost(*sizes, input_size=layer.size, **given)
            if conv == "chansel"
            else subkernel_cost(*sizes, **given)
        )
        elements = layer.size**2 * layer.in_channels + layer.output_size**2 * layer.out_channels
    return Work(
        parameters,
        passes * case.batch_size * multiply_adds,
        passes * case.batch_size * elements * ELEMENT_BYTES[case.dtype]
        + touches * parameters * PARAMETER_BYTES,
    )


def network_config(case: Case, conv: str) -> ResNetConfig:
    """Of the case's network, with that convolution, and its width if it names one."""
    kind, width = conv_and_width(conv)
    preset = PRESETS[case.model]
    return dataclasses.replace(
        preset, conv=CONVS[kind], num_classes=case.num_classes, width=width or preset.width
    )
