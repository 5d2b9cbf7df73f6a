"""Settings in a file: the `config.json` of a run, or YAML."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from chansel_jax.files import read_json
from experiments.training.settings import in_todays_names
from experiments.training.workdir import DATA_DIR


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's own takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} is given twice")
        return super().construct_mapping(node, deep)


def read_config(path: Path) -> Mapping[str, Any]:
    """The settings in `path`, by name, or nested as in the `config.json` of a run.

    Of such a run they are its own, with where its images were.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is neither JSON, of a file of that name, nor YAML, or holds no settings.
    """
    try:
        if path.suffix == ".json":
            content = read_json(path)
        else:
            content = yaml.load(path.read_bytes(), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # as of !!int ""
        raise ValueError(f"a value is not what its tag says ({error!r})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, Mapping):
        raise ValueError("it must hold names with values")
    if not isinstance(content.get("settings"), Mapping):
        return content
    settings, where = in_todays_names(content)["settings"], content.get(DATA_DIR)
    return {**settings, **({DATA_DIR: where} if where else {})}
