"""What people bring: weights in other formats or broken, images of all kinds, names;
and where results may go."""

import argparse
import datetime
import json
import math
import os
import pathlib
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pytest import raises

import ddpm
import train_ddpm
import vdu
from ddpm import UserError
from train_ddpm import class_indices, load_dataset, load_images

parametrize = pytest.mark.parametrize


# --- weights --------------------------------------------------------------------------


def safetensors(dtype, shape, numbers, padding=0):
    """A file by the rules of the format: the tensor x after another of one byte."""
    header = {
        "__metadata__": {},
        "odd": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]},
        "x": {"dtype": dtype, "shape": shape, "data_offsets": [1, 1 + len(numbers)]},
    }
    text = json.dumps(header).encode() + b" " * padding
    return struct.pack("<Q", len(text)) + text + b"1" + numbers


@parametrize("padding", [0, 1])  # the data need not begin at a multiple of anything
@parametrize("shape", [[], [2, 3], [0, 7]])
@parametrize("dtype, code, value", [
    ("F64", "00000000000008c0", -3),
    ("F32", "000040c0", -3),
    ("F16", "00c2", -3),
    ("BF16", "40c0", -3),
    ("I64", "fdffffffffffffff", -3),
    ("U8", "fd", 253),
])
def test_safetensors_are_read(tmp_path, dtype, code, value, shape, padding):
    path = tmp_path / "x.ckpt"  # known by its content, whatever its name
    n = math.prod(shape)
    content = safetensors(dtype, shape, bytes.fromhex(code) * n, padding)
    path.write_bytes(content)

    x = ddpm.read_file(path)["x"]

    assert x.shape == tuple(shape)
    assert x.flatten().tolist() == [value] * n
    x.zero_()  # in memory, and not in the file
    assert path.read_bytes() == content


WHOLE = safetensors("F32", [1], b"1234")


@parametrize("content", [
    b"",
    WHOLE[:60],
    WHOLE[:-1],
    WHOLE.replace(b"[1]", b"[2]"),
    WHOLE.replace(b"F32", b"F31"),
])
def test_broken_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)

    with raises(UserError, match="x.safetensors (is damaged|was refused)"):
        ddpm.read_file(path)


class Callback:
    """Of a trainer's package."""


class Dict(dict):
    """Likewise."""


@parametrize("value", [
    {Callback: Callback()},
    Dict(lr=1e-4),
    argparse.Namespace(lr=1e-4),
    np.arange(3.0),
    np.float32(2),
    np.random.get_state(),
    np.random.default_rng(0),
    datetime.datetime.now(),
    pathlib.PurePosixPath("/tmp"),
])
def test_what_trainers_leave_beside_the_weights_is_read_past(tmp_path, value):
    path = tmp_path / "x.safetensors"  # a pickle all the same
    state_dict = {"module._orig_mod.w": torch.ones(2)}
    torch.save({"epoch": 7, "state_dict": state_dict, "x": value}, path)

    raw = ddpm.read_file(path)

    assert raw["epoch"] == 7
    assert ddpm.state_dict_of(raw)["w"].tolist() == [1, 1]


def test_of_several_entries_it_is_said_which_was_taken(capsys):
    raw = {"model": {"w": torch.zeros(1)}, "ema": {"w": torch.ones(1)}}

    assert ddpm.state_dict_of({"state_dict": raw})["w"] == 1
    assert capsys.readouterr().out == "taking the entry 'ema', of ema, model\n"


@parametrize("raw", [
    # as DDIM's code saves: weights, optimizer, epoch, step, moving average
    [{"w": torch.zeros(1)}, {"state": {}}, 3, 400, {"module.w": torch.ones(1)}],
    [{"w": torch.ones(1)}, {"state": {}}],
    {"w": torch.ones(1), "ema": {"step": 3}},
    {"state_dict": {}, "model": {"ema": {"w": torch.ones(1)}}},
])
def test_weights_are_found_where_they_are(raw):
    assert ddpm.state_dict_of(raw)["w"] == 1
    assert ddpm.state_dict_of([1, 2]) == {}


@parametrize("new_format", [True, False])
@parametrize("function, argument", [
    (os.system, "touch {}"),
    (exec, "open('{}', 'w')"),
])
def test_what_asks_for_a_function_is_refused_unexecuted(tmp_path, function, argument, new_format):
    path = tmp_path / "x.pt"
    call = function, (argument.format(tmp_path / "went-off"),)
    bomb = type("Bomb", (), {"__reduce__": lambda self: call})
    torch.save(bomb(), path, _use_new_zipfile_serialization=new_format)

    with raises(UserError, match=f"x.pt was refused.*{function.__name__}"):
        ddpm.read_file(path)

    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def raw():
    """The dictionary of a checkpoint: the one that ships, with a small network."""
    raw = ddpm.read_file(train_ddpm.SHIPPED)
    raw["config"]["unet"] = {"model_channels": 8}
    new = ddpm.build(raw["config"])[0].state_dict
    return raw | {"weights": new(), "posterior": {"mean": new(), "std": new(), "n": 3}}


@parametrize("part, value", [
    ("config", {}),
    ("data", None),
    ("weights", {}),
    ("posterior", {"mean": {}}),
])
def test_a_checkpoint_that_lacks_something_is_refused(raw, tmp_path, part, value):
    path = tmp_path / "x.pt"
    torch.save(raw | {part: value}, path)

    with raises(UserError, match="x.pt"):
        ddpm.load_checkpoint(path)


@parametrize("part", ["weights", "mean", "std"])
def test_numbers_that_are_not_finite_are_named(raw, tmp_path, part):
    path = tmp_path / "x.pt"
    parts = raw | raw["posterior"]
    parts[part]["out.2.bias"] = torch.tensor([math.nan])
    torch.save(raw, path)

    with raises(UserError, match="x.pt is broken: .*out.2.bias"):
        ddpm.load_checkpoint(path)


# --- where results go -----------------------------------------------------------------


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "x.pt"

    def write(file):
        file.write(b"ours")
        path.write_bytes(b"theirs")

    with raises(UserError, match="x.pt exists already"):
        ddpm.write_atomically(path, write)

    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_the_file_behind_it_is_replaced(tmp_path):
    link = tmp_path / "x.pt"
    link.symlink_to(tmp_path / "behind.pt")

    ddpm.save_checkpoint(link, "old")
    ddpm.save_checkpoint(link, "new", overwrite=True)

    assert link.is_symlink()
    assert torch.load(tmp_path / "behind.pt") == "new"


# --- images ---------------------------------------------------------------------------

LEVELS = [[0, 100], [200, 255]]
GREY = Image.fromarray(np.uint8(LEVELS))
WIDE = Image.fromarray(np.uint16(LEVELS) * 257)
PALETTE = GREY.convert("P")
PALETTE.info["transparency"] = 200  # this level
CLEAR = WIDE.copy()
CLEAR.info["transparency"] = 200 * 257


@parametrize("name, image, expected", [
    ("16bit.png", WIDE, LEVELS),
    ("16bit.pgm", WIDE, LEVELS),
    # Level v, as opaque as it is bright, over white: 255 - v (255 - v) / 255.
    ("la.png", Image.merge("LA", [GREY, GREY]), [[255, 194], [212, 255]]),
    ("p.png", PALETTE, [[0, 100], [255, 255]]),
    ("cmyk.tiff", GREY.convert("CMYK"), LEVELS),
    ("16bit-a.png", CLEAR, [[0, 100], [255, 255]]),
    ("sides.png", GREY.crop((-3, 0, 5, 2)), LEVELS),
])
def test_pixels_are_what_a_viewer_shows(tmp_path, name, image, expected):
    image.save(tmp_path / name)

    pixels = load_images(tmp_path, (3, 2, 2))

    assert pixels.tolist() == [[expected] * 3]


def test_an_image_stands_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    GREY.rotate(180).save(tmp_path / "x.png", exif=exif)

    pixels = load_images(tmp_path, (1, 2, 2))

    assert pixels.tolist() == [[LEVELS]]


@parametrize("mode", ["F", "I"])
def test_an_image_of_numbers_of_unknown_range_is_refused_by_name(tmp_path, mode):
    Image.new(mode, (2, 2)).save(tmp_path / "x.tiff")

    with raises(UserError, match="x.tiff .*unknown range"):
        load_images(tmp_path, (3, 8, 8))


def folder_of(root, *names):
    """Images of 8x8 pixels, the first of level 20, the next of 40, ..."""
    for i, name in enumerate(names, 1):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(path)


def levels_of(images):
    return images[:, 0, 0, 0].tolist()


def test_links_are_followed_and_what_is_hidden_or_no_image_is_left_out(tmp_path, capsys):
    folder = tmp_path / "a"
    folder_of(folder, "1.png", "sub/2.PNG", "../else/3.png", ".4.png", ".x/5.png", "6.gif")
    (folder / "link").symlink_to(tmp_path / "else")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")

    images = load_images(folder, (1, 8, 8))

    assert sorted(levels_of(images)) == [20, 40, 60]
    assert "passing over 4 files" in capsys.readouterr().out


def test_a_folder_without_images_is_refused(tmp_path):
    with raises(UserError, match="no images in"):
        load_images(tmp_path, (1, 8, 8))


def test_images_that_are_all_grey_stay_grey(tmp_path):
    folder_of(tmp_path, "a.png")

    images = load_images(tmp_path, (None, 1, 1))

    assert images.tolist() == [[[[20]]]]


@parametrize("channels, expected", [
    (None, [20, 20, 20, 255, 0, 0]),
    (1, [20, 76]),  # 0.299 * 255
])
def test_grey_among_colours_is_as_the_network_wants_it(tmp_path, channels, expected):
    folder_of(tmp_path, "a.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.png")

    images = load_images(tmp_path, (channels, 1, 1))

    assert images.flatten().tolist() == pytest.approx(expected, abs=1)


# --- datasets -------------------------------------------------------------------------

COMPOSED = "caf\u00e9"
APART = "cafe\u0301"


@parametrize("test", ["test", "val", "valid"])
def test_a_folder_may_have_parts(tmp_path, test):
    """A test part that lacks a class has the others."""
    folder_of(tmp_path, "train/a/1.png", "train/b/2.png", f"{test}/b/3.png",
              "train/loose.png", "train/.hidden/4.png", "other/c/5.png")

    images, labels, data = load_dataset("folder", tmp_path)
    test_images, test_labels, _ = load_dataset("folder", tmp_path, train=False)

    assert data["classes"] == ["a", "b"]
    assert labels.tolist() == [0, 1]
    assert levels_of(images) == [20, 40]
    assert test_labels.tolist() == [1]
    assert levels_of(test_images) == [60]


def test_beside_other_folders_train_is_a_class(tmp_path):
    folder_of(tmp_path, "bus/1.png", "car/2.png", "train/steam/3.png")

    assert load_dataset("folder", tmp_path)[2]["classes"] == ["bus", "car", "train"]


def test_parts_may_have_capitals(tmp_path):
    folder_of(tmp_path, "Train/a/1.png", "Test/a/2.png")

    images, _, data = load_dataset("folder", tmp_path, train=False)

    assert data["classes"] == ["a"]
    assert levels_of(images) == [40]


def test_a_second_training_part_is_named(tmp_path, capsys):
    folder_of(tmp_path, "Train/a/1.png", "test/a/2.png", "train/a/3.png")

    load_dataset("folder", tmp_path)

    assert "passing over the folders train" in capsys.readouterr().out


@parametrize("names, said", [
    (["a/1.png", "test/a/2.png"], "test/ but no train/"),
    ([f"{COMPOSED}/1.png", f"{APART}/2.png"], "two folders that are both called"),
])
def test_folders_that_can_be_taken_in_two_ways_are_refused(tmp_path, names, said):
    folder_of(tmp_path, *names)

    with raises(UserError, match=said):
        load_dataset("folder", tmp_path)


def test_images_beside_the_classes_are_named(tmp_path, capsys):
    folder_of(tmp_path, "a/1.png", "loose.png")

    load_dataset("folder", tmp_path)

    assert "passing over 1 files" in capsys.readouterr().out


def test_a_folder_may_have_no_test_part(tmp_path):
    folder_of(tmp_path, "a/1.png")

    assert load_dataset("folder", tmp_path, train=False)[0] is None


@pytest.fixture
def checkpoint(tmp_path):
    """Trained on 9 images of three classes; those of one are still there."""
    folder_of(tmp_path, "b/1.png", "b/2.png", "c/no image.gif")
    data = {
        "name": "folder",
        "source": "folder",
        "root": tmp_path,
        "classes": ["a", "b", "c"],
        "images": 9,
    }
    return SimpleNamespace(data=data, config={"image_shape": (1, 8, 8)})


def test_one_class_is_read_where_the_others_are_gone(checkpoint):
    args = vdu.parser().parse_args(["--forget-class", "b"])

    images, rho = vdu.load_forget_images(args, checkpoint, [1])

    levels = train_ddpm.to_uint8(images)
    assert sorted(levels_of(levels)) == [20, 40]
    assert rho == 2 / 9


def test_rho_is_counted_in_training_and_any_of_the_images_may_be_drawn(checkpoint):
    """One of the class's three is gone."""
    checkpoint.data["counts"] = [4, 3, 2]
    levels = set()

    for seed in range(9):
        line = f"--forget-class b --forget-samples 1 --seed {seed}"
        args = vdu.parser().parse_args(line.split())
        images, rho = vdu.load_forget_images(args, checkpoint, [1])
        levels.update(levels_of(train_ddpm.to_uint8(images)))

    assert levels == {20, 40}
    assert rho == 3 / 9


@parametrize("only, name", [
    (None, "a"),
    ([2], "c"),
])
def test_a_class_without_images_is_named(checkpoint, only, name):
    with raises(UserError, match=f"no images of the class {name}"):
        train_ddpm.load_data_of(checkpoint, only=only)


CLASSES = ["Cat", "black, cat", "cat", COMPOSED, "goldfish, Carassius auratus"]


@parametrize("names, expected", [
    (["cat"], [2]),
    (["black, cat"], [1]),
    ([APART], [3]),
    (["carassius auratus", "cat", "GoldFish"], [2, 4]),
])
def test_a_class_is_known_by_its_name_or_one_of_its_words(names, expected):
    assert class_indices(names, CLASSES) == expected


@parametrize("name", ["gold", "CAT"])
def test_a_name_of_no_class_or_of_several_is_refused_with_the_choice(name):
    with raises(UserError, match=f"'{name}'.* Cat; black, cat; cat"):
        class_indices([name], CLASSES)


def test_names_of_folders_are_composed(tmp_path):
    folder_of(tmp_path, f"{APART}/1.png")

    data = load_dataset("folder", tmp_path)[2]

    assert data["classes"] == [COMPOSED]
