"""Which runs share compiled functions; that these are right, the tests of training say."""

import dataclasses
from pathlib import Path

import pytest

from experiments.training.compilation import what_compilation_needs
from experiments.training.settings import DataSettings, ReadingSettings, Settings


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({"seed": 1}, True),
        ({"data": DataSettings(dataset="folder", data_dir=Path("images"))}, True),
        ({"reading": ReadingSettings("streaming")}, True),
        ({"workdir": Path("run"), "resume": "must", "save_every_steps": 1}, True),
        ({"conv": "subkernel"}, False),
        ({"network": dataclasses.replace(Settings().network, width=4)}, False),
        ({"training": dataclasses.replace(Settings().training, epochs=3)}, False),
    ],
)
def test_runs_that_differ_in_seed_data_and_folder_share_what_is_compiled(change, shared):
    settings, other = Settings(), dataclasses.replace(Settings(), **change)
    assert (what_compilation_needs(settings) == what_compilation_needs(other)) == shared
