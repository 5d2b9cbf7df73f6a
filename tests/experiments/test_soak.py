"""A short form of the soak, which is a command of its own."""

from soak import soak


def test_killed_run_ends_like_one_that_was_never_killed(tmp_path):
    outcome = soak(tmp_path, kills=2, epochs=1)
    assert outcome.kills == 2 and outcome.same
    assert list(outcome.steps) == sorted(outcome.steps) and outcome.steps[-1] > 0
