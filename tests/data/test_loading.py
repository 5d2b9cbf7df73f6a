import os
import pwd
import subprocess
import sys

import numpy as np
import pytest

from chansel_jax.data import DATASETS, DataError, load
from chansel_jax.data.cache import PART, load_source
from chansel_jax.data.source import Content, Source, choose_per_class
from chansel_jax.data.summary import CHUNK


def one_line(error):
    return str(error.value).count("\n") == 0


def test_names():
    assert DATASETS == ("silhouettes", "dog_cat_bird", "cifar10", "cifar100", "folder")


def test_unknown_name():
    with pytest.raises(DataError, match=r"^there is no data set mnist, but silhouettes, .*folder$"):
        load("mnist")


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "folder"])
@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"classes": ("cat", "dog")}, "--classes=cat,dog"),
        ({"train_per_class": 10}, "--train-per-class=10"),
        ({"image_size": 64}, "--image-size=64"),
        ({"split_seed": 3}, "--split-seed=3"),
        ({"fold": 4}, "--fold=4"),
    ],
    ids=str,
)
def test_choices_that_only_a_folder_has(name, options, shown):
    message = f"{shown} is for the data set folder only, not for {name}"
    with pytest.raises(DataError, match=f"^{message}$"):
        load(name, **options)


SCRIPT = """
import sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"tried to reach {args}")

sys.addaudithook(refuse)
from chansel_jax.data import load
from chansel_jax.data.silhouettes import silhouettes
assert list(silhouettes().read(None).splits) == ["train", "validation"]
assert len(load("folder", data_dir=sys.argv[1]).splits["train"].labels) == 8
assert "tensorflow" not in sys.modules
"""


def test_needs_no_tensorflow_and_no_network_and_leaves_nothing_about(
    tmp_path, write_images, cache_dir
):
    write_images(tmp_path / "images", {"cat": 5, "dog": 5})
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path / "images")],
        env={
            **os.environ,
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert (run.stdout, run.stderr) == ("", "")
    assert len(list((cache_dir / "chansel_images").iterdir())) == 1
    assert list(home.iterdir()) == []
    assert list(temporary.iterdir()) == []


def truncated(folder):
    path = next(folder.glob("*train.array_record*"))
    os.truncate(path, path.stat().st_size // 2)


def emptied(folder):
    os.truncate(next(folder.glob("*train.array_record*")), 0)


def without_records(folder):
    next(folder.glob("*train.array_record*")).unlink()


def with_changed_bytes(folder):
    path = next(folder.glob("*train.array_record*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def without_info(folder):
    (folder / "dataset_info.json").unlink()


def with_broken_info(folder):
    (folder / "dataset_info.json").write_text("{")


def bare(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        emptied,
        without_records,
        with_changed_bytes,
        without_info,
        with_broken_info,
        bare,
    ],
)
def test_damaged_cache_names_the_folder_to_delete(tmp_path, damage):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    content = Content(("one",), {"train": zip(images, [0] * 40, strict=True)})
    source = Source("noise", lambda download_dir: content)
    load_source(source, tmp_path)
    folder = tmp_path / "chansel_images" / "noise"
    damage(folder / "1.0.0")
    message = f"^the prepared data set cannot be read, delete {folder} and try again: "
    with pytest.raises(DataError, match=message) as error:
        load_source(source, tmp_path)
    assert one_line(error)


def test_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"^cannot prepare silhouettes in {tmp_path}/file") as error:
        load(data_dir=tmp_path / "file")
    assert one_line(error)


def small_content(download_dir=None):
    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    return Content(("one",), {"train": zip(images, [0, 0, 0], strict=True)})


def test_leftovers_of_a_killed_preparation_do_no_harm(tmp_path):
    source = Source("small", small_content)
    load_source(source, tmp_path)
    folder = tmp_path / "chansel_images" / "small"
    (folder / "1.0.0").rename(folder / "incomplete.ABCDEF_1.0.0")
    assert load_source(source, tmp_path).splits["train"].images.shape == (3, 4, 4, 3)


def test_two_processes_may_prepare_the_same(tmp_path):
    def overtaken(download_dir):
        load_source(Source("small", small_content), tmp_path)
        return small_content()

    dataset = load_source(Source("small", overtaken), tmp_path)
    assert dataset.splits["train"].images.shape == (3, 4, 4, 3)


def test_images_keep_their_order(tmp_path):
    count = CHUNK + PART + 2
    images = np.random.default_rng(0).integers(0, 256, (count, 5, 4, 3), np.uint8)
    labels = np.arange(count) % 3
    content = Content(("a", "b", "c"), {"train": zip(images, labels, strict=True)})
    dataset = load_source(Source("many", lambda download_dir: content), tmp_path)
    np.testing.assert_array_equal(dataset.splits["train"].images, images)
    np.testing.assert_array_equal(dataset.splits["train"].labels, labels)


def test_choose_per_class():
    labels = np.array([0, 1, 0, 1, 1, 0, 2])
    chosen, rest = choose_per_class(labels, [2, 1, 0], seed=0)
    assert np.bincount(labels[chosen], minlength=3).tolist() == [2, 1, 0]
    assert sorted([*chosen, *rest]) == list(range(7))
    assert (np.diff(chosen) > 0).all()
    assert (np.diff(rest) > 0).all()


def test_choice_is_the_same_on_every_machine():
    chosen, _ = choose_per_class(np.arange(20) % 2, [3, 3], seed=0)
    assert chosen.tolist() == [4, 5, 7, 8, 12, 19]


def test_user_without_a_home_is_asked_for_a_folder(monkeypatch):
    """As of a user id that the machine does not know."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(DataError, match="^prepared data sets are kept in ~/kept, but no home is"):
        load(data_dir="~/kept")


def test_folder_that_is_not_utf8_keeps_no_data_sets(tmp_path):
    folder = tmp_path / "caf\udce9"
    with pytest.raises(DataError, match=r"caf\\udce9' must be UTF-8"):
        load("silhouettes", data_dir=folder)
    assert not folder.exists()
