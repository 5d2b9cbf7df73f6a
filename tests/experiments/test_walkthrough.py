"""The notebook, cell by cell, as a small training."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "walkthrough.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_it_is_committed_as_it_was_written(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 10
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_every_cell_runs(cells, tmp_path, capsys):
    names = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                names |= {"folder": tmp_path, "epochs": 1, "width": 4, "blocks": (1,)}
                names |= {"train_images": 60, "validation_images": 30}
    printed = capsys.readouterr().out
    assert float(re.search(r"differ by at most (\S+)\.\n", printed)[1]) < 1e-4
    dense, chansel = (
        int(re.search(rf"^{conv}: ([\d,]+) parameters", printed, re.M)[1].replace(",", ""))
        for conv in ("subkernel", "chansel")
    )
    assert chansel < dense
    assert "The exported network predicts the same" in printed
    assert (tmp_path / "network.stablehlo").stat().st_size > 1000
