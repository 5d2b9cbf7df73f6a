"""The README's network that is not ours, from plain convolutions to a program elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
from commands import environment
from flax import nnx

README = Path(__file__).parents[1] / "chansel_jax" / "README.md"
RELOADED = """
import sys
sys.modules["chansel_jax"] = sys.modules["flax"] = None  # as if they were not installed
import jax, numpy as np
from pathlib import Path
program = jax.export.deserialize(bytearray(Path("unet.stablehlo").read_bytes()))
np.save("outputs.npy", program.call(np.load("images.npy")))
"""


def test_a_network_of_the_readme_goes_all_the_way(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"## All the way.*?```python\n(.*?)```", README.read_text(), re.S)
    exec(compile(code, "README.md", "exec"), names := {"__name__": "readme"})
    printed = capsys.readouterr().out
    # By hand: 16 · 32 + 9 · 32 + 32 and 32 · 16 + 9 · 16 + 16 in the place of 16 · 32 · 9 + 32 and
    # 32 · 16 · 9 + 16.
    assert "these layers     9,264              1,504" in printed
    assert [row.path for row in names["report"].rows] == ["down", "joined"]
    assert np.isfinite(names["loss"])

    network, restored = names["network"], names["restored"]
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(n)) for n in (restored, network)))
    images = np.random.default_rng(0).standard_normal((3, 12, 10, 3)).astype(np.float32)
    np.save("images.npy", images)
    subprocess.run([sys.executable, "-c", RELOADED], check=True, env=environment(1), timeout=120)
    network.eval()
    np.testing.assert_allclose(np.load("outputs.npy"), network(jnp.asarray(images)), 0, 1e-5)
