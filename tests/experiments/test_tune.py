"""The command that measures the lowerings again, with layers of a few pixels."""

import re
import time

import jax
import jax.numpy as jnp
import pytest

from chansel_jax.ops import dense, depthwise, selection
from chansel_jax.ops.lowerings import runnable
from experiments import tune
from experiments.tune import Result, Settings, Shape

TINY = (Shape(6, 3, 4), Shape(5, 2, 3, kernel=1, strides=2, rank=2))


def test_measures_every_lowering_of_every_shape(monkeypatch, capsys):
    monkeypatch.setattr(tune, "LAYERS", TINY)
    monkeypatch.setattr(tune, "HOPELESS", float("inf"))
    tune.main(Settings(batch_size=2, rounds=2, dtypes=("float32", "bfloat16")))
    printed = capsys.readouterr().out
    assert jax.__version__ in printed
    for dtype in ("float32", "bfloat16"):
        for title, choices in (
            ("layer", selection.LOWERINGS),
            ("depthwise part", depthwise.LOWERINGS),
            ("dense convolution", dense.LOWERINGS),
            ("BatchNorm", ("native", "lax")),
        ):
            table = printed.partition(f"{title}, {dtype}, forward + backward, ms")[2]
            names = [name for name in runnable(choices) if name != "auto"]
            assert "| " + " | ".join(["layer", *names, "fastest", "auto"]) + " |\n" in table
            assert "\n| 6² 3→4, 3×3 |" in table and "\n| 5² 2→3, 1×1 /2 rank 2 |" in table
    assert len(re.findall(r"auto is the fastest for [0-2] of 2 shapes", printed)) == 8


def test_what_is_hopeless_is_timed_once():
    calls = []

    def counted(name, seconds):
        def call(x):
            def note(x):
                calls.append(name)
                time.sleep(seconds)
                return x

            return jax.pure_callback(note, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

        return jax.custom_vjp(call)

    # So far apart that they stay so whatever else runs here.
    functions = {"fast": counted("fast", 0.001), "slow": counted("slow", 1.0)}
    for function in functions.values():
        function.defvjp(lambda x, f=function: (f.fun(x), None), lambda _, dy: (dy,))
    found = tune.time_calls(functions, (jnp.ones(3),), rounds=4)
    assert calls.count("slow") == 1 and calls.count("fast") == 5
    assert found["slow"] >= 1000 and 1 <= found["fast"] < 1000


def test_the_report_by_hand():
    results = [
        Result(Shape(8, 4, 4), {"grouped": 4.0, "shifted": 1.0}, "shifted"),
        Result(Shape(9, 4, 4, strides=2), {"grouped": 2.0, "shifted": 5.0}, "shifted"),
    ]
    assert tune.report("layer, ms", results).splitlines() == [
        "",
        "layer, ms:",
        "",
        "| layer | grouped | shifted | fastest | auto |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 8² 4→4, 3×3 | 4.00 | 1.00 | shifted | shifted |",
        "| 9² 4→4, 3×3 /2 | 2.00 | 5.00 | grouped | shifted |",
        "",
        # (1 + 5) / (1 + 2)
        "auto is the fastest for 1 of 2 shapes; all shapes take 2.00 times as long as in the "
        "fastest lowering of each",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"batch_size": -3}, "batch_size=-3 must be at least 1"),
        ({"dtypes": ()}, "dtypes= must be different dtypes, at least one"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)
