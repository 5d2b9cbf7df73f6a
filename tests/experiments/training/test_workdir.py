"""Whose folder it is: new, the same run's, another's, renamed, damaged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.training import workdir as workdirs
from experiments.training.run import BEFORE_THEY_WERE
from experiments.training.settings import NetworkSettings, Settings, decisive
from experiments.training.typed_json import from_json
from experiments.training.workdir import WorkdirError

CONFIG = {
    "settings": {"seed": 0, "network": {"conv": "chansel", "width": None}},
    "data": {"class_names": ("cat", "dog"), "mean": [1.5, 2.25]},
}


@pytest.fixture(params=["checkpoint", "summary"])
def workdir(tmp_path, request):
    """The folder of a run with `CONFIG`: one with a checkpoint, or a finished one without."""
    path = tmp_path / "runs" / "mine"
    claim(path, CONFIG, "auto")
    if request.param == "checkpoint":
        save(path)
    else:
        (path / "summary.json").write_text("{}")
    return path


def claim(workdir, config, resume, defaults=None, data_dir=None):
    """Claims the folder and lets it go."""
    with workdirs.claim(workdir, config, resume, defaults, data_dir) as aside:
        return aside


def save(workdir):
    """Something in the place of a checkpoint."""
    (workdir / "checkpoints" / "1").mkdir(parents=True)
    (workdir / "checkpoints" / "1" / "arrays").write_bytes(b"\x00parameters")


def snapshot(root):
    """Bytes and time of change of everything under `root`, by path."""
    return {
        str(path.relative_to(root)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in (root, *root.rglob("*"))
    }


def contents(root):
    return {name: content for name, (_, content) in snapshot(root).items()}


def changed(config, **settings):
    return {**config, "settings": {**config["settings"], **settings}}


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("exists", [False, True])
def test_new_folder_gets_its_config(tmp_path, resume, exists):
    path = tmp_path / "runs" / "mine"
    if exists:
        path.mkdir(parents=True)
    assert claim(path, CONFIG, resume) is None
    assert sorted(entry.name for entry in path.iterdir()) == [".lock", "config.json"]
    assert json.loads((path / "config.json").read_text()) == json.loads(json.dumps(CONFIG))


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_same_config_touches_nothing(tmp_path, workdir, resume):
    before = snapshot(tmp_path)
    assert claim(workdir, CONFIG, resume) is None
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_other_config_is_refused_with_all_that_differs_and_touches_nothing(
    tmp_path, workdir, resume
):
    other = {
        "settings": {"seed": 1, "network": {"conv": "subkernel", "width": None}, "epochs": 20},
        "data": {"class_names": ("cat", "dog"), "mean": [1.5, 2.5]},
    }
    before = snapshot(tmp_path)
    with pytest.raises(WorkdirError) as raised:
        claim(workdir, other, resume)
    assert str(raised.value) == (
        f"the run in {workdir} has other settings (mean: [1.5, 2.25] → [1.5, 2.5]; "
        "epochs: None → 20; conv: chansel → subkernel; seed: 0 → 1): "
        "take another --workdir, or --resume=never to start anew"
    )
    assert snapshot(tmp_path) == before


def test_setting_that_is_gone_is_named(workdir):
    other = changed(CONFIG)
    del other["settings"]["seed"]
    with pytest.raises(WorkdirError, match=r"\(seed: 0 → None\)"):
        claim(workdir, other, "auto")


def test_what_an_older_run_lacks_is_as_by_default(tmp_path, workdir):
    newer = changed(CONFIG, accumulate=1)
    before = snapshot(tmp_path)
    with pytest.raises(WorkdirError, match=r"\(accumulate: None → 1\)"):
        claim(workdir, newer, "auto")
    defaults = {"settings": {"accumulate": 1, "seed": 5}}
    with pytest.raises(WorkdirError, match=r"\(accumulate: 1 → 2\)"):
        claim(workdir, changed(CONFIG, accumulate=2), "auto", defaults)
    assert claim(workdir, newer, "auto", defaults) is None
    assert snapshot(tmp_path) == before


def test_run_that_knows_no_blocks_has_the_models_own(tmp_path):
    """A run from when there was no such setting."""
    config = {"settings": decisive(Settings())}
    assert config["settings"]["network"].pop("blocks") == []
    claim(tmp_path, config, "auto")
    save(tmp_path)
    assert "blocks" not in (tmp_path / "config.json").read_text()
    claim(tmp_path, {"settings": decisive(Settings())}, "must", BEFORE_THEY_WERE)
    assert from_json(Settings, config["settings"]) == Settings()
    other = decisive(Settings(network=NetworkSettings(blocks=(1,))))
    with pytest.raises(WorkdirError, match=r"blocks: \[\] → \[1\]"):
        claim(tmp_path, {"settings": other}, "must", BEFORE_THEY_WERE)


@pytest.mark.parametrize("config", [CONFIG, changed(CONFIG, seed=1)], ids=["same", "other"])
def test_never_renames_the_run_and_keeps_its_content(tmp_path, workdir, config):
    before = snapshot(workdir)
    aside = claim(workdir, config, "never")
    assert aside == tmp_path / "runs" / "mine.1"
    assert snapshot(aside) == before
    assert contents(workdir).keys() == {".", ".lock", "config.json"}
    with pytest.raises(WorkdirError, match="there is no run"):
        claim(workdir, config, "must")


def test_never_leaves_a_link_and_the_new_run_on_its_disk(tmp_path, workdir):
    before = contents(workdir)
    link = tmp_path / "link"
    link.symlink_to(workdir, target_is_directory=True)
    assert claim(link, CONFIG, "never") == tmp_path / "runs" / "mine.1"
    assert contents(tmp_path / "runs" / "mine.1") == before
    assert link.is_symlink() and contents(workdir).keys() == {".", ".lock", "config.json"}


def test_never_counts_on_past_folders_and_files(tmp_path, workdir):
    (tmp_path / "runs" / "mine.2").write_text("a file of someone else's")
    contents_of = {}
    for seed, name in ((1, "mine.1"), (2, "mine.3"), (3, "mine.4")):
        contents_of[name] = contents(workdir)
        assert claim(workdir, changed(CONFIG, seed=seed), "never").name == name
        save(workdir)
    for name, before in contents_of.items():
        assert contents(tmp_path / "runs" / name) == before
    assert (tmp_path / "runs" / "mine.2").read_text() == "a file of someone else's"


@pytest.mark.parametrize("exists", [False, True])
def test_must_without_a_run_fails_and_makes_nothing(tmp_path, exists):
    path = tmp_path / "mine"
    if exists:
        path.mkdir()
    before = snapshot(tmp_path)
    with pytest.raises(WorkdirError, match=f"--resume=must: there is no run in {path}"):
        claim(path, CONFIG, "must")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_settings_are_checked_before_the_data_are_there(tmp_path, workdir, resume):
    before = snapshot(tmp_path)
    part = {"settings": CONFIG["settings"]}
    workdirs.check(workdir, part, resume)
    with pytest.raises(WorkdirError, match=r"other settings \(seed: 0 → 1\)"):
        workdirs.check(workdir, changed(part, seed=1), resume)
    workdirs.check(workdir, changed(part, seed=1), "never")
    assert snapshot(tmp_path) == before


def test_folder_that_cannot_be_made_is_refused_and_none_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    workdirs.check(tmp_path / "new" / "run", CONFIG, "auto")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(WorkdirError, match=f"cannot write to --workdir={path}: .* is a file"):
            workdirs.check(path, CONFIG, "auto")
    monkeypatch.setattr(workdirs.os, "access", lambda path, mode: False)
    with pytest.raises(WorkdirError, match="Permission denied"):
        workdirs.check(tmp_path / "new", CONFIG, "auto")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_config_knows_where_the_images_lie_and_follows_them(tmp_path, workdir):
    for name in ("here", "there"):
        claim(workdir, CONFIG, "auto", data_dir=tmp_path / name)
        stored = json.loads((workdir / "config.json").read_text())
        assert stored == {**json.loads(json.dumps(CONFIG)), "data_dir": str(tmp_path / name)}
    before = snapshot(tmp_path)
    claim(workdir, CONFIG, "auto")
    assert snapshot(tmp_path) == before
    with pytest.raises(WorkdirError, match=r"\(seed: 0 → 1\)"):
        claim(workdir, changed(CONFIG, seed=1), "auto")


DAMAGED = [b"", b'{"settings": {', b"[]", b"null", b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("resume", ["auto", "must"])
@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:9]))
def test_damaged_config_is_named_in_one_line_and_touches_nothing(
    tmp_path, workdir, content, resume
):
    (workdir / "config.json").write_bytes(content)
    before = snapshot(tmp_path)
    with pytest.raises(WorkdirError) as raised:
        claim(workdir, CONFIG, resume)
    [line] = str(raised.value).splitlines()
    assert line.startswith(f"{workdir / 'config.json'} cannot be read (")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:9]))
def test_never_puts_a_damaged_run_aside(workdir, content):
    (workdir / "config.json").write_bytes(content)
    aside = claim(workdir, CONFIG, "never")
    assert (aside / "config.json").read_bytes() == content
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(CONFIG))


def test_run_that_never_saved_may_begin_with_other_settings(tmp_path):
    claim(tmp_path / "run", CONFIG, "auto")
    assert claim(tmp_path / "run", changed(CONFIG, seed=1), "auto") is None
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["seed"] == 1


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_checkpoints_without_their_settings_are_refused(tmp_path, resume):
    save(tmp_path / "run")
    with pytest.raises(WorkdirError, match=r"config\.json cannot be read"):
        claim(tmp_path / "run", {"epochs": 1}, resume)


def test_current_folder_is_not_renamed(tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(WorkdirError, match="--resume=never cannot rename the current folder"):
        claim(Path(), {"epochs": 1}, "never")
    assert snapshot(tmp_path) == before


def test_second_process_is_refused_until_the_first_has_ended(tmp_path):
    workdir = tmp_path / "run"
    claim(workdir, {"epochs": 1}, "auto")
    script = """
import sys, pathlib
from experiments.training.workdir import claim
with claim(pathlib.Path(sys.argv[1]), {"epochs": 1}, "never"):
    print("claimed", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(workdir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline() == b"claimed\n"
        save(workdir)
        before = snapshot(workdir)
        for resume in ("auto", "must", "never"):
            with pytest.raises(WorkdirError, match=f"another process is at work in {workdir}"):
                claim(workdir, {"epochs": 1}, resume)
            assert snapshot(workdir) == before
        first.kill()
    for resume in ("auto", "must", "never"):
        claim(workdir, {"epochs": 1}, resume)
