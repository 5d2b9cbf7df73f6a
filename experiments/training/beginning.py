"""The parameters that a training begins with: those of another run, or of a file."""

from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors

from chansel_jax.functional import network_tree, not_finite_in
from chansel_jax.networks.resnet import ResNet
from chansel_jax.torch_weights import load_safetensors
from experiments.cli.errors import CommandError
from experiments.training.load import load_run
from experiments.training.settings import Settings, build_network

CLASSIFIER = "fc.weight"  # ends its name in a file, in which others may end so too


def read_beginning(
    settings: Settings, report: Callable[[str], object]
) -> tuple[ResNet, Sequence[str] | None]:
    """The network whose parameters `settings.init` names, and its classes if they are known.

    Args:
        settings: of the training.
        report: takes a line for each damaged checkpoint of a run that is passed over.

    Raises:
        CommandError: if there is neither a run nor a file of weights, or it cannot be read or is of
            another network, or has values that are not finite.
        CheckpointError: if the run's checkpoint cannot be restored.
    """
    path = settings.init
    network, class_names = _read(path, settings, report)
    if found := not_finite_in(network_tree(network)):
        more = f" and {len(found) - 1} others" if found[1:] else ""
        raise CommandError(f"init={path} has values that are not finite in {found[0]}{more}")
    return network, class_names


def _read(
    path: Path, settings: Settings, report: Callable[[str], object]
) -> tuple[ResNet, Sequence[str] | None]:
    if (path / "config.json").is_file():
        run = load_run(path, "best", lambda line: report(f"{path}: {line}"))
        return run.network, run.class_names
    if path.suffix != ".safetensors" or not path.is_file():
        raise CommandError(f"init={path} is neither the folder of a run nor a .safetensors file")
    try:
        network = build_network(settings, _classes(path))
        load_safetensors(network, path)
    except (ValueError, OSError) as error:
        told = " ".join(str(error).splitlines()[:2])  # how many do not fit, and the first of them
        raise CommandError(f"init={path} cannot be taken: {told}") from error
    return network, None


def _classes(path: Path) -> int:
    """How many classes the network in a file of weights has."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            # The shortest, since all names have the same words in front.
            names = file.keys()
            ends = [name for name in names if name.endswith(CLASSIFIER)]
            name = min(ends, key=len, default=None)
            shape = file.get_slice(name).get_shape() if name else ()
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is not a safetensors file: {error}") from error
    if len(shape) != 2 or not shape[0]:
        raise ValueError(f"it has no classifier, whose name would end in {CLASSIFIER}")
    return shape[0]
