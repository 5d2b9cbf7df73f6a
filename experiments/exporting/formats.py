"""The formats of exported networks: how each is written, read again, and used."""

import dataclasses
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chansel_jax.export import load_stablehlo, save_stablehlo, to_stablehlo
from chansel_jax.networks.resnet import CONVS, PRESETS, ResNet
from chansel_jax.torch_weights import load_safetensors, save_safetensors
from chansel_jax.training.prediction import make_predict
from experiments.training.load import Run

Name = Literal["stablehlo", "safetensors", "onnx"]
Predict = Callable[[np.ndarray], np.ndarray]


class Format(NamedTuple):
    """A format.

    Attributes:
        file: what the file is called.
        packages: what it needs besides the package, by the names that are imported.
        save: writes the network of a run to a path.
        load: from the run and the path, the function from images `(N, H, W, 3)` uint8 to
            probabilities `(N, classes)`.
        described: what the file is, in a sentence.
        code: Python that reads it, for a run.
    """

    file: str
    packages: tuple[str, ...]
    save: Callable[[Run, Path], None]
    load: Callable[[Run, Path], Predict]
    described: str
    code: Callable[[Run], str]


def in_float32(run: Run) -> Run:
    """`run`, whose network computes in float32 if it was trained in another dtype."""
    config = run.network.config
    if config.dtype == jnp.float32:
        return run
    config = dataclasses.replace(config, dtype=jnp.float32)
    network = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    nnx.update(network, nnx.state(run.network))
    return dataclasses.replace(run, network=network)


def predict_of(run: Run, network: ResNet) -> Predict:
    """What `experiments.predict` computes with `network`, for a few images."""
    return make_predict(network, run.mean, run.std, batch_size=4)


def _save_stablehlo(run: Run, path: Path) -> None:
    network = nnx.Sequential(run.network, jax.nn.softmax)
    shape, statistics = (None, *run.image_shape), {"mean": run.mean, "std": run.std}
    save_stablehlo(to_stablehlo(network, shape, dtype=jnp.uint8, **statistics), path)


def _load_stablehlo(run: Run, path: Path) -> Predict:
    program = load_stablehlo(path)
    return lambda images: np.asarray(program.call(images))


def _stablehlo_code(run: Run) -> str:
    return """\
    from pathlib import Path
    from jax import export

    program = export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))
    probabilities = program.call(images)
    """


def _save_safetensors(run: Run, path: Path) -> None:
    save_safetensors(run.network, path)


def _load_safetensors(run: Run, path: Path) -> Predict:
    network = nnx.clone(run.network)
    arrays = nnx.state(network, (nnx.Param, nnx.BatchStat))
    nnx.update(network, jax.tree.map(jnp.zeros_like, arrays))  # all that counts is in the file
    load_safetensors(network, path)
    return predict_of(run, network)


def _safetensors_code(run: Run) -> str:
    conv = CONVS[run.settings.conv].__name__
    config, preset = run.network.config, PRESETS[run.settings.network.model]
    brought = getattr(config.conv, "keywords", {})
    given = [f", {name}={brought[name]!r}" for name in ("norm", "share") if name in brought]
    made = f"functools.partial({conv}{''.join(given)})" if given else conv
    imported = "    import functools\n" if given else ""
    changed = [
        f"{field.name}={getattr(config, field.name)!r}, "
        for field in dataclasses.fields(config)
        if field.name not in ("conv", "num_classes", "dtype")
        and getattr(config, field.name) != getattr(preset, field.name)
    ]
    # Digits that a float32 needs, rather than those of the float64 next to it.
    mean, std = (", ".join(map(str, values)) for values in (run.mean, run.std))
    return f"""\
{imported}    import jax
    import numpy as np
    from flax import nnx
    from chansel_jax import {conv}, make_network
    from chansel_jax.torch_weights import load_safetensors

    network = make_network(
        "{run.settings.network.model}", {made}, {len(run.class_names)}, \
{"".join(changed)}rngs=nnx.Rngs(0)
    )
    load_safetensors(network, "model.safetensors")
    network.eval()
    mean, std = np.float32([{mean}]), np.float32([{std}])
    probabilities = jax.nn.softmax(network((images - mean) / std))
    """


def _save_onnx(run: Run, path: Path) -> None:
    from experiments.pytorch.onnx_file import save_onnx  # PyTorch takes seconds to import

    save_onnx(
        run.network,
        run.settings.conv,
        path,
        image_shape=run.image_shape,
        mean=run.mean,
        std=run.std,
        class_names=run.class_names,
    )


def _load_onnx(run: Run, path: Path) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _onnx_code(run: Run) -> str:
    return """\
    import onnxruntime

    session = onnxruntime.InferenceSession("model.onnx")
    (probabilities,) = session.run(None, {"images": images})
    """


FORMATS: dict[Name, Format] = {
    "stablehlo": Format(
        "model.stablehlo",
        ("flatbuffers",),
        _save_stablehlo,
        _load_stablehlo,
        "This is a program of JAX for CPUs, NVIDIA GPUs and TPUs. It normalises the images itself, "
        "and needs the packages jax and flatbuffers alone.",
        _stablehlo_code,
    ),
    "safetensors": Format(
        "model.safetensors",
        ("safetensors",),
        _save_safetensors,
        _load_safetensors,
        "These are the parameters and BatchNorm's running statistics, with the names of "
        "torchvision's networks and the shapes of PyTorch, whose `load_state_dict` takes what "
        "`safetensors.torch.load_file` reads.",
        _safetensors_code,
    ),
    "onnx": Format(
        "model.onnx",
        ("torch", "onnx", "onnxscript", "onnxruntime"),
        _save_onnx,
        _load_onnx,
        "This is a program for ONNX Runtime and others. It normalises the images itself.",
        _onnx_code,
    ),
}


def code(name: Name, run: Run) -> str:
    """Python that predicts with the file of that format, from `images` `(N, H, W, 3)` uint8."""
    return textwrap.dedent(FORMATS[name].code(run)).rstrip()
