from experiments.reporting.machine import VARIABLES, with_variables


def test_commands_name_the_variables_that_are_set(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert with_variables("python -m a") == "python -m a"
    monkeypatch.setenv("XLA_FLAGS", "--one --two")
    monkeypatch.setenv("CHANSEL_JAX_INSTRUCTION_SET", "avx2")
    expected = "CHANSEL_JAX_INSTRUCTION_SET=avx2 XLA_FLAGS='--one --two' python -m a"
    assert with_variables("python -m a") == expected
