import io
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from chansel_jax.data import DataError, load
from chansel_jax.data.image_files import read_image

SPLITS = {"train/cat": 10, "train/dog": 10, "validation/cat": 2, "validation/dog": 2}


def by_label(split):
    """For each label the set of its images, as bytes."""
    return {
        int(label): {image.tobytes() for image in split.images[split.labels == label]}
        for label in np.unique(split.labels)
    }


def arrays_in(arrays, folder):
    return {array.tobytes() for path, array in arrays.items() if path.parent == folder}


def counts(dataset):
    return {name: np.bincount(split.labels).tolist() for name, split in dataset.splits.items()}


def refusal(root, **options):
    with pytest.raises(DataError) as caught:
        load("folder", data_dir=root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "images"


def test_three_splits(root, write_images):
    arrays = write_images(root, {**SPLITS, "test/cat": 3, "test/dog": 4})
    dataset = load("folder", data_dir=root)
    assert dataset.name == "folder"
    assert dataset.class_names == ("cat", "dog")
    assert list(dataset.splits) == ["train", "validation", "test"]
    for name, split in dataset.splits.items():
        assert split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
        assert split.labels.dtype == np.int32
        expected = [arrays_in(arrays, root / name / class_name) for class_name in ("cat", "dog")]
        assert by_label(split) == dict(enumerate(expected))


@pytest.mark.parametrize("test", [{}, {"test/cat": 3, "test/dog": 3}], ids=["alone", "with test"])
def test_validation_is_a_fifth_of_train(root, write_images, test):
    arrays = write_images(root, {"train/cat": 10, "train/dog": 20, **test})
    dataset = load("folder", data_dir=root)
    without_test = {"train": [8, 16], "validation": [2, 4]}
    assert counts(dataset) == without_test | ({"test": [3, 3]} if test else {})
    train, validation = (by_label(dataset.splits[name]) for name in ("train", "validation"))
    for label, class_name in enumerate(dataset.class_names):
        assert not train[label] & validation[label]
        expected = arrays_in(arrays, root / "train" / class_name)
        assert train[label] | validation[label] == expected


@pytest.mark.parametrize("name", ["val", "valid", "eval"])
def test_validation_folder_has_other_names(root, write_images, name):
    arrays = write_images(
        root, {"train/cat": 5, "train/dog": 5, f"{name}/cat": 2, f"{name}/dog": 1}
    )
    dataset = load("folder", data_dir=root)
    assert counts(dataset) == {"train": [5, 5], "validation": [2, 1]}
    expected = [arrays_in(arrays, root / name / class_name) for class_name in ("cat", "dog")]
    assert by_label(dataset.splits["validation"]) == dict(enumerate(expected))


def test_other_names_of_the_validation_folder_may_be_classes(root, write_images):
    write_images(root, {"invalid": 5, "valid": 5})
    assert load("folder", data_dir=root).class_names == ("invalid", "valid")


def test_classes_without_split_folders(root, write_images):
    arrays = write_images(root, {"dog": 5, "cat": 5})
    dataset = load("folder", data_dir=str(root))
    assert dataset.class_names == ("cat", "dog")
    assert counts(dataset) == {"train": [4, 4], "validation": [1, 1]}
    assert by_label(dataset.splits["train"])[0] < arrays_in(arrays, root / "cat")


def test_split_seed_decides_the_split(root, write_images):
    write_images(root, {"cat": 20, "dog": 20})
    first, again, other = (
        by_label(load("folder", data_dir=root, split_seed=seed).splits["validation"])
        for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(("options", "folds"), [({}, 5), ({"train_per_class": 7}, 2)], ids=str)
def test_folds_share_no_validation_image(root, write_images, options, folds):
    arrays = write_images(root, {"cat": 10, "dog": 11})
    whole = by_label(load("folder", data_dir=root, **options).splits["validation"])
    seen = [set(), set()]
    for fold in range(folds):
        splits = load("folder", data_dir=root, fold=fold, **options).splits
        train, validation = by_label(splits["train"]), by_label(splits["validation"])
        assert [len(validation[i]) for i in (0, 1)] == [len(whole[i]) for i in (0, 1)]
        for label, name in enumerate(("cat", "dog")):
            assert not validation[label] & (seen[label] | train[label])
            seen[label] |= validation[label]
            if "train_per_class" not in options:
                assert validation[label] | train[label] == arrays_in(arrays, root / name)
    assert [len(images) for images in seen] == [folds * len(whole[i]) for i in (0, 1)]
    assert f"--fold={folds} must be at most {folds - 1}" in refusal(root, fold=folds, **options)


def test_a_fold_of_images_that_are_divided_already(root, write_images):
    write_images(root, SPLITS)
    message = "--fold=1 chooses images for validation, for which there is a folder already"
    assert message in refusal(root, fold=1)
    assert message in refusal(root, fold=1, train_per_class=2)


def test_classes_are_selected_in_the_order_given(root, write_images):
    arrays = write_images(root, {"train/cat": 5, "train/dog": 5, "train/eel": 5, "test/fly": 1})
    write_images(root, {"test/dog": 2, "test/eel": 1})
    dataset = load("folder", data_dir=root, classes=("eel", "dog"))
    assert dataset.class_names == ("eel", "dog")
    assert by_label(dataset.splits["train"])[0] < arrays_in(arrays, root / "train" / "eel")
    assert counts(dataset)["test"] == [1, 2]


def test_train_per_class_leaves_the_rest_for_validation(root, write_images):
    write_images(root, {"cat": 10, "dog": 13})
    dataset = load("folder", data_dir=root, train_per_class=7)
    assert counts(dataset) == {"train": [7, 7], "validation": [3, 6]}


def test_train_per_class_beside_a_validation_folder(root, write_images):
    write_images(root, SPLITS)
    dataset = load("folder", data_dir=root, train_per_class=7)
    assert counts(dataset) == {"train": [7, 7], "validation": [2, 2]}


def decoded(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


EXTENSIONS = ("png", "PNG", "jpg", "JPEG", "webp", "bmp", "gif", "tif", "tiff")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_pixels_are_those_that_pillow_decodes(root, write_images, mode):
    expected = {}
    for path in write_images(root, dict.fromkeys(SPLITS, 2), size=(6, 9)):
        found = expected.setdefault(path.parent, set())
        for extension in EXTENSIONS:
            written = path.with_name(f"{path.stem}-{extension}.{extension}")
            # JPEG has no palettes
            stored = "CMYK" if mode == "P" and extension in ("jpg", "JPEG") else mode
            Image.open(path).convert(stored).save(written)
            found.add(decoded(written).tobytes())
        path.rename(path.with_suffix(".txt"))  # is passed over, as the extension decides
    for name, split in load("folder", data_dir=root).splits.items():
        images = [expected[root / name / class_name] for class_name in ("cat", "dog")]
        assert by_label(split) == dict(enumerate(images))
        assert len(split.labels) == 2 * 2 * len(EXTENSIONS)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped(root, write_images, mode):
    arrays = write_images(root, {"train/cat": 2, "train/dog": 2, "test/cat": 1, "test/dog": 1})
    for path, array in arrays.items():
        grey = Image.fromarray(array[..., 0])
        if mode == "P":
            image = grey.convert("P")
            image.save(path, transparency=bytes(range(256)))
        else:
            image = grey.convert(mode)
            image.putalpha(Image.fromarray(array[..., 1]))
            image.save(path)
    greys = {path: array[..., :1].repeat(3, axis=-1) for path, array in arrays.items()}
    expected = [arrays_in(greys, root / "test" / name) for name in ("cat", "dog")]
    assert by_label(load("folder", data_dir=root).splits["test"]) == dict(enumerate(expected))


def test_hidden_and_other_files_are_passed_over(root, write_images):
    write_images(root, SPLITS)
    (root / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / "folder").mkdir()
    (root / "train" / "cat" / "folder" / "notes.txt").write_text("no image")
    (root / "train" / ".cache").mkdir()
    (root / "notes").mkdir()
    for folder in (
        root / ".hidden",
        root / "__MACOSX",
        root / "train" / "cat" / ".ipynb_checkpoints",
        root / "train" / "@eaDir" / "cat",
        root / "train" / "cat" / "@eaDir" / "00.png",
        root / "train" / "dog" / "__MACOSX",
        root / "validation" / "$RECYCLE.BIN",
        root / "#recycle",
    ):
        folder.mkdir(parents=True)
        (folder / "00.png").write_bytes(b"")
    (root / "train" / "readme.txt").write_text("no image")
    assert counts(load("folder", data_dir=root)) == {"train": [10, 10], "validation": [2, 2]}


def test_photograph_taken_sideways_is_turned(root, write_images):
    write_images(root, {"train/cat": 5, "train/dog": 5})
    path = root / "train" / "cat" / "00.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: its right side is up
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(path, exif=exif)
    splits = load("folder", data_dir=root).splits.values()
    assert any((np.rot90(pixels, -1) == image).all() for s in splits for image in s.images)


def exif(*entries):
    """EXIF data of the entries (tag, type, count, four bytes)."""
    packed = b"".join(struct.pack("<HHL4s", *entry) for entry in entries)
    return struct.pack("<6sHHLH", b"Exif", 0x4949, 42, 8, len(entries)) + packed + bytes(4)


def png_text(profile):
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", profile)
    return {"pnginfo": text}


TURNED, TEXT = (0x0112, 3, 1, b"\6\0\0\0"), (0x0112, 2, 2, b"6\0\0\0")
TEXT_AS_WIDTH = (0x0100, 2, 4, b"abc\0")
DAMAGED_EXIF = {
    "orientation as text": ({"exif": exif(TEXT)}, 0),
    "width as text": ({"exif": exif(TEXT_AS_WIDTH)}, 0),
    "width as text, turned": ({"exif": exif(TEXT_AS_WIDTH, TURNED)}, -1),
    "no EXIF data": ({"exif": b"Exif\0\0no EXIF data"}, 0),
    "raw profile": (png_text("\nexif\n 12\nnot hexadecimal\n"), 0),
    "short raw profile": (png_text("exif"), 0),
}


@pytest.mark.parametrize(("damage", "turns"), DAMAGED_EXIF.values(), ids=DAMAGED_EXIF)
def test_damaged_exif_data_are_not_the_image(tmp_path, damage, turns):
    pixels = NOISE[:6]
    Image.fromarray(pixels).save(tmp_path / "00.png", **damage)
    np.testing.assert_array_equal(read_image(tmp_path / "00.png"), np.rot90(pixels, turns))


def test_no_program_is_run_on_a_file(tmp_path):
    path = tmp_path / "00.png"  # Pillow looks at what is in it, and has Ghostscript draw this
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(DataError, match="cannot identify image file"):
        read_image(path)


def animated(array, other):
    buffer = io.BytesIO()
    frames = [Image.fromarray(other)]
    Image.fromarray(array).save(
        buffer, "webp", lossless=True, save_all=True, append_images=frames, duration=100
    )
    return buffer.getvalue()


def test_first_frame_of_an_animation_is_taken(root, write_images):
    write_images(root, SPLITS)
    first, second = NOISE, 255 - NOISE
    path = root / "train" / "cat" / "00.webp"
    path.write_bytes(animated(first, second))
    images = by_label(load("folder", data_dir=root).splits["train"])[0]
    assert first.tobytes() in images and second.tobytes() not in images


def test_printers_colours_become_red_green_and_blue(root, write_images):
    write_images(root, SPLITS)
    path = root / "train" / "cat" / "00.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, quality=100)
    (train, _) = load("folder", data_dir=root).splits.values()
    red = np.abs(train.images.astype(int) - (255, 0, 0)).max(axis=(1, 2, 3)) < 5
    assert red.sum() == 1 and train.labels[red] == 0


def test_extension_need_not_be_that_of_the_content(root, write_images):
    arrays = write_images(root, SPLITS)
    path = root / "train" / "cat" / "00.png"
    path.rename(path.with_suffix(".jpg"))
    assert arrays[path].tobytes() in by_label(load("folder", data_dir=root).splits["train"])[0]


def test_single_pixel_fills_an_image(root, write_images):
    write_images(root, SPLITS)
    Image.new("RGB", (1, 1), (1, 2, 3)).save(root / "train" / "cat" / "00.png")
    images = load("folder", data_dir=root, image_size=8).splits["train"].images
    assert ((images == (1, 2, 3)).all(axis=(1, 2, 3))).sum() == 1


def test_negative_split_seed(root, write_images):
    write_images(root, {"cat": 5, "dog": 5})
    assert "--split-seed=-1" in refusal(root, split_seed=-1)
    assert "--fold=-1 must not be negative" in refusal(root, fold=-1)


def test_image_size_scales_the_shorter_side_and_keeps_the_centre(root, write_images):
    write_images(root, {"train/dog": 1, "validation/dog": 1})
    for i, (width, height) in enumerate([(48, 16), (16, 40), (32, 32), (8, 8), (4, 5)]):
        red = Image.new("RGB", (width, height), (255, 0, 0))
        side = min(width, height)
        box = ((width - side) // 2, (height - side) // 2)
        red.paste(Image.new("RGB", (side, side), (0, 0, 255)), box)
        path = root / ("train" if i < 4 else "validation") / "cat" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        red.save(path)
    train = load("folder", data_dir=root, image_size=8).splits["train"]
    images = train.images[train.labels == 0]
    assert images.shape == (4, 8, 8, 3)
    assert (images[..., 2] > 200).all()  # at the sides some of the red is blended in
    assert (images[..., 0] < 55).all()


def test_image_size_smooths_what_it_shrinks(root):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    for folder in ("train/cat", "train/dog", "validation/cat", "validation/dog"):
        (root / folder).mkdir(parents=True)
        Image.fromarray(stripes).save(root / folder / "0.png")
    image = load("folder", data_dir=root, image_size=8).splits["train"].images[0]
    assert np.abs(image.astype(int) - 127).max() < 20


def test_image_size_that_fits_changes_nothing(root, write_images):
    write_images(root, SPLITS)
    plain, sized = (load("folder", data_dir=root, image_size=size) for size in (None, 8))
    np.testing.assert_array_equal(plain.splits["train"].images, sized.splits["train"].images)


def prepared(cache_dir):
    return {path.name for path in (cache_dir / "chansel_images").iterdir()}


def test_is_prepared_once_and_outside_the_tree(root, write_images, cache_dir):
    write_images(root, SPLITS)
    before = sorted(root.rglob("*"))
    load("folder", data_dir=root)
    (folder,) = prepared(cache_dir)
    (record_file,) = cache_dir.rglob("*train*")
    written = record_file.stat().st_mtime_ns
    load("folder", data_dir=root)
    assert prepared(cache_dir) == {folder}
    assert record_file.stat().st_mtime_ns == written
    assert sorted(root.rglob("*")) == before


def change_pixels(root):
    path = root / "train" / "cat" / "00.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


def remove_image(root):
    (root / "train" / "cat" / "00.png").unlink()


def add_image(root):
    shutil.copy(root / "train" / "cat" / "00.png", root / "train" / "cat" / "xx.png")


def exchange_images(root):
    """Sizes stay what they are, modification times are what tells."""
    first, second = root / "train" / "cat" / "00.png", root / "train" / "dog" / "00.png"
    first_content, second_content = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_content)
    second.write_bytes(first_content)
    for path in (first, second):
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("change", [change_pixels, remove_image, add_image, exchange_images])
def test_changed_tree_is_prepared_anew(root, write_images, change):
    write_images(root, SPLITS)
    load("folder", data_dir=root)
    change(root)
    train = load("folder", data_dir=root).splits["train"]
    for label, class_name in enumerate(("cat", "dog")):
        paths = (root / "train" / class_name).iterdir()
        assert by_label(train)[label] == {np.asarray(Image.open(p)).tobytes() for p in paths}


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 4},
        {"classes": ("cat", "dog")},
        {"classes": ("dog", "cat")},
        {"train_per_class": 3},
        {"split_seed": 1},
        {"fold": 1},
    ],
    ids=str,
)
def test_each_choice_is_prepared_by_itself(root, write_images, cache_dir, options):
    write_images(root, {"cat": 10, "dog": 10})
    load("folder", data_dir=root)
    load("folder", data_dir=root, **options)
    # Naming all classes in their own order asks for nothing else.
    assert len(prepared(cache_dir)) == (1 if options == {"classes": ("cat", "dog")} else 2)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ({}, {}, "{root} has no folders, one is expected for each class"),
        (
            {"": 3},
            {},
            "{root} has no folders, one is expected for each class: nobody could tell what its "
            "images show",
        ),
        ({"test/cat": 1}, {}, "{root} has a folder test but no folder train"),
        ({"val/cat": 1, "x/cat": 1}, {}, "{root} has a folder val but no folder train"),
        ({"Train/cat": 1, "Val/cat": 1}, {}, "{root} has a folder Train but no folder train"),
        ({"training/cat": 1, "test/cat": 1}, {}, "{root} has a folder test but no folder train"),
        ({"train/cat": 5, "train/dog": 0}, {}, "the class dog has no images: {root}/train/dog"),
        (
            {**SPLITS, "test/cat": 0, "test/dog": 1},
            {},
            "the class cat has no images: {root}/test/cat",
        ),
        (
            {**SPLITS, "test/cat": 1, "test/dog": 1, "test/eel": 1},
            {},
            "the class eel of {root}/test is not in {root}/train",
        ),
        ({**SPLITS, "test/cat": 1}, {}, "the class dog of {root}/train is not in {root}/test"),
        (
            {**SPLITS, "train/eel": 2},
            {"classes": ("dog", "eel")},
            "the class eel of {root}/train is not in {root}/validation",
        ),
        ({"cat": 5}, {}, "{root} has one class only, cat: to tell classes apart takes two"),
        (
            {"cat": 5, "dog": 5},
            {"classes": ("dog",)},
            "{root} has one class only, dog: to tell classes apart takes two",
        ),
        (
            {**SPLITS, "train": 1},
            {},
            "{root}/train/00.png lies beside the classes: each class has a folder",
        ),
        ({**SPLITS, "": 1}, {}, "{root}/00.png lies beside the folders train, validation"),
        (
            {"train/cat": 5, "train/dog": 5, "holdout/cat": 2},
            {},
            "{root}/holdout holds images, but is none of train, validation, val, valid, eval, test",
        ),
        (
            {**SPLITS, "val/cat": 2, "val/dog": 2},
            {},
            "{root} has the folders validation and val: only one can be used",
        ),
        (
            {"train/cat": 5, "train/dog": 5, "eval": 0, "valid/cat": 2},
            {},
            "{root} has the folders valid and eval: only one can be used",
        ),
        (
            {"train/cat": 5, "train/dog": 5, "val/cat": 2},
            {},
            "the class dog of {root}/train is not in {root}/val",
        ),
        (
            {"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/dog": 1, "": 1},
            {},
            "{root}/00.png lies beside the folders train, val",
        ),
        (
            {**SPLITS, "train/dog/more/and": 1},
            {},
            "{root}/train/dog/more/and/00.png lies in a folder within the class dog: move it up",
        ),
        (
            {"cat": 5, "dog": 5},
            {"classes": ("cat", "eel")},
            "there is no class eel in {root}, but cat, dog",
        ),
        (
            {"cat": 5, "dog": 5},
            {"classes": ("cat", "cat")},
            "--classes=cat,cat names a class twice",
        ),
        (
            {"cat": 10, "dog": 7},
            {"train_per_class": 7},
            "training and validation with --train-per-class=7 needs 8 images of dog, not 7",
        ),
        (
            SPLITS,
            {"train_per_class": 11},
            "training with --train-per-class=11 needs 11 images of cat, not 10",
        ),
        ({"cat": 1, "dog": 5}, {}, "training and validation needs 2 images of cat, not 1"),
        ({"cat": 5}, {"train_per_class": 0}, "--train-per-class=0 must be at least 1"),
        ({"cat": 5}, {"image_size": 0}, "--image-size=0 must be at least 1"),
    ],
)
def test_bad_trees_and_choices(root, write_images, cache_dir, images, options, message):
    root.mkdir()
    write_images(root, images)
    assert refusal(root, **options) == message.format(root=root)
    assert not cache_dir.exists()


def test_link_to_nothing(root, write_images):
    write_images(root, SPLITS)
    (root / "train" / "cat" / "link.png").symlink_to(root / "none")
    assert refusal(root).endswith(f"No such file or directory: '{root}/train/cat/link.png'")


def test_links_to_folders_are_followed_unless_they_lead_back(root, write_images, tmp_path):
    write_images(tmp_path, {"elsewhere/cat": 10, "elsewhere/more": 1})
    write_images(root, {"dog": 10})
    (root / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    for folder in (root, root / "cat", root / "dog"):
        (folder / "back").symlink_to(root)
    assert counts(load("folder", data_dir=root)) == {"train": [8, 8], "validation": [2, 2]}
    (root / "dog" / "link").symlink_to(tmp_path / "elsewhere")
    assert refusal(root).startswith(f"{root}/dog/link/cat/00.png lies in a folder within")


def test_class_that_is_a_link_to_nothing_is_not_left_out(root, write_images):
    write_images(root, {"cat": 10, "dog": 10})
    (root / "eel").symlink_to("nowhere")
    assert refusal(root) == f"{root}/eel is a link to nothing"


def test_pipe_is_not_waited_for(root, write_images):
    write_images(root, SPLITS)
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    assert refusal(root) == f"{root}/train/cat/pipe.png cannot be read as an image: it is no file"


def test_no_such_folder(root):
    assert refusal(root) == f"data_dir={root} is no folder"


def test_file_instead_of_a_folder(root):
    root.write_text("")
    assert refusal(root) == f"data_dir={root} is no folder: an archive must be unpacked first"


def test_data_dir_is_needed():
    with pytest.raises(DataError, match="^the data set folder needs --data-dir=PATH"):
        load("folder")


def encoded(array, file_format):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, file_format)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def bomb():
    """A small file of 20,000 × 20,000 pixels."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "png")
    return buffer.getvalue()


def png_of_16_bits(colour_type):
    """Black, 8 × 8, of PNG's colour type 2 (RGB), 4 (grey and alpha) or 6 (RGB and alpha)."""
    channels = {2: 3, 4: 2, 6: 4}[colour_type]

    def chunk(name, data):
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(8 * channels * 2)) * 8)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


NO_IMAGES = {
    "empty": b"",
    "text": b"no image",
    **{
        f"cut {kind}": encoded(NOISE, kind)[:-40]
        for kind in ("png", "jpeg", "webp", "bmp", "gif", "tiff")
    },
    "16 bits": encoded(np.zeros((8, 8), np.uint16), "png"),
    "16 bits, colours": png_of_16_bits(2),
    "16 bits, grey and opacity": png_of_16_bits(4),
    "16 bits, colours and opacity": png_of_16_bits(6),
}


@pytest.mark.parametrize("name", [*NO_IMAGES, "bomb"])
def test_file_that_is_no_image(tmp_path, name):
    path = tmp_path / "0  0.png"
    path.write_bytes(bomb() if name == "bomb" else NO_IMAGES[name])
    with pytest.raises(DataError, match=f"^{path} cannot be read as an image: ") as error:
        read_image(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("position", [0, 7], ids=["first", "later"])
def test_refused_image_leaves_nothing_and_can_be_replaced(root, write_images, cache_dir, position):
    write_images(root, SPLITS)
    path = root / "train" / "cat" / f"{position:02}.png"
    good = path.read_bytes()
    path.write_bytes(good[:-40])
    assert refusal(root).startswith(f"{path} cannot be read as an image: ")
    assert not [path for path in cache_dir.rglob("*") if path.is_file()]
    assert not list(cache_dir.rglob("folder-*"))
    path.write_bytes(good)
    load("folder", data_dir=root)


@pytest.mark.parametrize(
    "name", ["cat ", "\u3000cat", "c\nat", "c\rat", "c\u2028at", "c\u200bat", "\u202etac"]
)
def test_class_names_that_would_be_changed_are_refused(root, write_images, name):
    write_images(root, {"cat": 2, name: 2, f"{name}s": 2})
    told = refusal(root)
    assert told.startswith("rename ") and repr(name) in told and repr("cat") not in told


def test_class_names_are_kept_as_they_are(root, write_images):
    names = ("$a_$", "a  b", "caf\xe9", "cafe\u0301", "\u732b", "\U0001f431", "a\u200cb")
    write_images(root, dict.fromkeys(names, 2))
    assert load("folder", data_dir=root).class_names == tuple(sorted(names))


@pytest.mark.parametrize("first", [0, 3])
def test_all_images_that_cannot_be_read_are_named(root, write_images, first):
    paths = [path for path in write_images(root, SPLITS) if int(path.stem) >= first]
    for path in paths[: len(paths) // 2]:
        path.write_text("no image")
    for path in paths[len(paths) // 2 :]:
        path.unlink()
        path.symlink_to("nowhere")
    told, kept = refusal(root), paths[:20]
    assert [told.count(f"{path} cannot be read as an image: ") for path in kept] == [1] * len(kept)
    assert told.endswith("and 4 more") == (first == 0)


def test_images_of_different_sizes(root, write_images):
    write_images(root, SPLITS)
    other = root / "validation" / "dog" / "01.png"
    Image.new("RGB", (9, 7)).save(other)
    assert refusal(root) == (
        f"the images differ in size, {root}/train/cat/00.png is 8 x 8 and {other} is 9 x 7: "
        "give --image-size=N to resize them"
    )
    assert load("folder", data_dir=root, image_size=8).splits["validation"].images.shape[1:3] == (
        8,
        8,
    )


@pytest.mark.parametrize("place", [".", "cat", "train/cat"])
def test_no_other_data_set_is_kept_among_images(root, write_images, place):
    """Who forgets to say that the images are a folder's is told, and they stay alone."""
    write_images(root, {place: 2})
    before = sorted(root.rglob("*"))
    with pytest.raises(DataError, match=r"^data_dir=.* holds images \(.*--dataset=folder$"):
        load("silhouettes", data_dir=root)
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("splits", [{"cat": 10, "dog": 10}, SPLITS], ids=["classes", "splits"])
def test_data_sets_that_were_kept_among_images_are_passed_over(root, write_images, splits):
    write_images(root, splits)
    expected = counts(load("folder", data_dir=root))
    (root / "chansel_images" / "silhouettes" / "1.0.0").mkdir(parents=True)
    (root / "downloads").mkdir()
    dataset = load("folder", data_dir=root)
    assert dataset.class_names == ("cat", "dog") and counts(dataset) == expected


def test_class_of_downloads_stays_one(root, write_images):
    write_images(root, {"cat": 10, "downloads": 10})
    (root / "chansel_images").mkdir()
    assert load("folder", data_dir=root).class_names == ("cat", "downloads")


@pytest.mark.parametrize("place", [".", "cache/deeper"])
def test_prepared_images_are_not_kept_among_images(root, write_images, monkeypatch, place):
    write_images(root, {"cat": 10, "dog": 10})
    monkeypatch.setenv("TFDS_DATA_DIR", str(root / place))
    assert refusal(root).startswith(f"TFDS_DATA_DIR={root / place}, where the prepared images")
    assert sorted(path.name for path in root.iterdir()) == ["cat", "dog"]
