"""What people bring: weights in other formats or broken, images of all kinds, names;
and where results may go."""

import argparse
import datetime
import json
import os
import pathlib
import struct
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm
import train_ddpm
import vdu
from ddpm import UserError
from train_ddpm import class_indices, load_dataset, load_images, read_images


def safetensors(tensors, padding=0):
    """A file by the rules of the format, of {name: (dtype, shape, bytes)}."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, numbers) in tensors.items():
        ends = [len(data), len(data := data + numbers)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": ends}
    text = json.dumps(header).encode() + b" " * padding
    return struct.pack("<Q", len(text)) + text + data


NUMBERS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64,
           "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
BITS = {"BF16": "c03f00c0", "F8_E4M3": "3cc0", "F8_E5M2": "3ec0"}  # of 1.5 and -2


@pytest.mark.parametrize("padding", range(4))  # the data need not begin at a multiple of anything
def test_safetensors_are_read_by_the_rules_of_the_format(tmp_path, padding):
    arrays = {k: (np.arange(6).reshape(2, 3) % 2).astype(d) for k, d in NUMBERS.items()}
    path = tmp_path / "x.ckpt"  # known by its content, whatever its name
    path.write_bytes(before := safetensors({
        **{k: (k, [2, 3], array.tobytes()) for k, array in arrays.items()},
        **{k: (k, [2], bytes.fromhex(code)) for k, code in BITS.items()},
        "none": ("F32", [0, 7], b""), "one": ("F32", [], struct.pack("<f", 0.25))}, padding))
    tensors = ddpm.read_file(path)
    assert set(tensors) == {*NUMBERS, *BITS, "none", "one"}
    for name, array in arrays.items():
        assert torch.equal(tensors[name], torch.from_numpy(array))
        assert tensors[name].dtype == torch.from_numpy(array).dtype
    assert all(tensors[name].float().tolist() == [1.5, -2.0] for name in BITS)
    assert tensors["none"].shape == (0, 7) and tensors["one"].item() == 0.25
    tensors["F32"] += 1  # in memory, and not in the file
    assert path.read_bytes() == before
    whole = safetensors({"a": ("F32", [1], b"1234")}, padding)
    for content in (b"", whole[:60], whole[:-1], whole.replace(b"[1]", b"[2]"),
                    whole.replace(b"F32", b"F31")):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="x.safetensors (is damaged|was refused)"):
            ddpm.read_file(tmp_path / "x.safetensors")


def test_what_trainers_leave_beside_the_weights_is_read_past(tmp_path):
    module = ModuleType("lightning_like")  # a package that a reader may lack
    inside = {"__module__": module.__name__}
    module.Callback, module.Dict = type("Callback", (), inside), type("Dict", (dict,), inside)
    (callback := module.Callback()).best = torch.tensor(0.1)
    path = tmp_path / "x.safetensors"  # a pickle all the same
    for value in ({module.Callback: callback}, module.Dict(lr=1e-4), argparse.Namespace(lr=1e-4),
                  np.arange(3.0), np.float32(2), np.random.get_state(), np.random.default_rng(0),
                  datetime.datetime.now(), pathlib.PurePosixPath("/tmp")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, module.__name__, module)
            torch.save({"epoch": 7, "state_dict": {"module.w": torch.ones(2)}, "x": value}, path)
        raw = ddpm.read_file(path)
        assert raw["epoch"] == 7 and ddpm.state_dict_of(raw)["w"].tolist() == [1, 1], value


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("function, argument", [(os.system, "touch {}"), (exec, "open('{}', 'w')")])
def test_what_asks_for_a_function_is_refused_unexecuted(tmp_path, function, argument, new_format):
    call = function, (argument.format(tmp_path / "went-off"),)
    contents = {"weights": torch.ones(2), "x": type("X", (), {"__reduce__": lambda self: call})()}
    torch.save(contents, tmp_path / "x.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match=f"x.pt was refused.*{function.__name__}"):
        ddpm.read_file(tmp_path / "x.pt")
    assert not (tmp_path / "went-off").exists()


@pytest.fixture(scope="module")
def raw():
    """The dictionary of a small checkpoint."""
    config = {"unet": dict(model_channels=8, channel_mult=[1], num_heads=1), "schedule": "linear",
              "timesteps": 50, "velocity": False, "image_shape": [1, 8, 8]}
    weights = ddpm.build(config)[0].state_dict()
    data = {"name": "mnist", "source": "torchvision", "root": None, "classes": ["0", "1"],
            "excluded": [], "images": 9}
    return {"config": config, "weights": weights, "data": data, "step": 1,
            "posterior": {"mean": weights, "std": {k: v.exp() for k, v in weights.items()}, "n": 3}}


def test_a_checkpoint_is_whole_and_finite_or_refused(raw, tmp_path):
    posterior, broken = raw["posterior"], {k: v.clone() for k, v in raw["weights"].items()}
    broken["time_embed.2.bias"][3] = float("nan")
    for change, word in (({"config": {}}, ""), ({"data": None}, ""), ({"weights": {}}, ""),
                         ({"posterior": {"mean": {}, "std": {}, "n": 2}}, ""),
                         ({"weights": broken}, ".* time_embed.2.bias"),
                         ({"posterior": {**posterior, "mean": broken}}, ".* posterior.*2.bias"),
                         ({"posterior": {**posterior, "std": broken}}, ".* posterior.*2.bias")):
        torch.save({**raw, **change}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"x.pt{word}"):
            ddpm.load_checkpoint(tmp_path / "x.pt")


LEVELS = np.array([[0, 100], [200, 255]], dtype=np.uint8)
GREY, WIDE = Image.fromarray(LEVELS), Image.fromarray(LEVELS * np.uint16(257))
ON_WHITE = [[255, 194], [212, 255]]  # level v as opaque as it is bright: 255 - v (255 - v) / 255
TURNED, PALETTE = Image.Exif(), GREY.convert("P")
TURNED[0x0112], PALETTE.info["transparency"] = 3, 200  # by 180 degrees; level 200 is none


@pytest.mark.parametrize("name, image, options, expected", [
    ("16bit.png", WIDE, {}, LEVELS), ("16bit.pgm", WIDE, {}, LEVELS),
    ("bits.png", Image.fromarray(LEVELS > 150), {}, [[0, 0], [255, 255]]),
    ("la.png", Image.merge("LA", [GREY] * 2), {}, ON_WHITE),
    ("rgba.png", Image.merge("RGBA", [GREY] * 4), {}, ON_WHITE),
    ("p.png", PALETTE, {"transparency": b"\0" + b"\xff" * 254}, [[255, 100], [200, 255]]),
    ("p1.png", PALETTE, {}, [[0, 100], [255, 255]]),
    ("pa.tiff", PALETTE.convert("PA"), {}, [[0, 100], [255, 255]]),
    ("cmyk.tiff", GREY.convert("CMYK"), {}, LEVELS),
    ("turned.png", GREY, {"exif": TURNED}, LEVELS[::-1, ::-1]),
    ("sides.png", Image.fromarray(np.pad(LEVELS, ((0, 0), (3, 3)))), {}, LEVELS),
    ("line.png", Image.new("L", (5000, 1), 100), {}, [[100] * 2] * 2)], ids=lambda x: str(x)[:9])
def test_pixels_are_what_a_viewer_shows(tmp_path, name, image, options, expected):
    image.save(tmp_path / name, **options)
    pixels = read_images([tmp_path / name], (3, 2, 2))[0]
    assert pixels.tolist() == [np.array(expected).tolist()] * 3


def test_an_image_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "big.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "big.png").read_bytes()[:50])
    for mode in ("F", "I"):  # 32-bit numbers of unknown range
        Image.new(mode, (2, 2)).save(tmp_path / f"{mode}.tiff")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for name in ("big.png", "cut.png", "F.tiff", "I.tiff"):
        with pytest.raises(UserError, match=name):
            read_images([tmp_path / name], (3, 8, 8))


def folder_of(root, *names):
    """Images of 8x8 pixels, the first of level 20, the next of 40, ..."""
    for i, name in enumerate(names, 1):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(root / name)
    return root


def test_what_lies_in_a_folder(tmp_path, capsys):
    """Hidden files are left out, links followed once, and what is no image counted."""
    folder = folder_of(tmp_path / "a", "1.png", "sub/2.PNG", "../else/3.png", ".4.png", ".x/5.png")
    for name, target in (("a/link", tmp_path / "else"), ("else/back", folder),
                         ("a/sub/self", folder / "sub"), ("a/gone.png", tmp_path / "nowhere")):
        (tmp_path / name).symlink_to(target)
    GREY.save(folder / "moving.gif", save_all=True, append_images=[GREY])
    (folder / "folder.png").mkdir()
    assert load_images(folder, (1, 8, 8))[:, 0, 0, 0].tolist() == [20, 60, 40]
    said = capsys.readouterr().out
    assert "2 files" in said and "gone.png" in said and "moving.gif" in said
    with pytest.raises(UserError, match="no images in .*folder.png"):
        load_images(folder / "folder.png", (1, 8, 8))


def test_grey_stays_grey_and_mixed_with_colour_becomes_colour(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "a.png")
    for channels in (1, None):
        images = load_images(tmp_path, (channels, 16, 16))
        assert images.shape == (1, 1, 16, 16) and images.flatten().tolist() == list(range(256))
    Image.new("RGB", (20, 18), (240, 0, 0)).save(tmp_path / "b.png")
    images = load_images(tmp_path, (None, 16, 16))
    assert [x[:, 15, 15].tolist() for x in images] == [[255] * 3, [240, 0, 0]]
    grey = load_images(tmp_path, (1, 16, 16))[1]
    assert grey.unique().item() == pytest.approx(0.299 * 240, abs=1)


@pytest.mark.parametrize("test", ["test", "val", "valid"])
def test_parts_of_a_folder(tmp_path, test):
    folder = folder_of(tmp_path, "train/a/1.png", "train/b/2.png", f"{test}/b/3.png",
                       "train/loose.png", "train/.hidden/4.png", "other/c/5.png")
    images, labels, data = load_dataset("folder", folder)
    assert data["classes"] == ["a", "b"] and labels.tolist() == [0, 1]
    assert images[:, 0, 0, 0].tolist() == [20, 40]
    # a test part that lacks a class has the others
    images, labels, _ = load_dataset("folder", folder, train=False)
    assert labels.tolist() == [1] and images[0, 0, 0, 0] == 60
    assert load_dataset("folder", folder / "train", train=False)[:2] == (None, None)


def test_one_class_is_read_where_the_others_are_gone(raw, tmp_path):
    folder = folder_of(tmp_path / "photos", "b/1.png", "b/2.png", "c/not an image.gif")
    data = {"name": "folder", "root": str(folder), "classes": ["a", "b", "c"]}
    torch.save({**raw, "data": {**raw["data"], **data}}, tmp_path / "x.pt")
    checkpoint = ddpm.load_checkpoint(tmp_path / "x.pt")
    args = SimpleNamespace(seed=0, forget_images=None, data_root=None, share=None,
                           forget_samples=None)
    forget, rho = vdu.load_forget_images(args, checkpoint, [1])
    assert forget.shape == (2, 1, 8, 8) and rho == 2 / 9  # of the 9 that it was trained on
    assert torch.equal(forget[:, 0, 0, 0].sort().values, torch.tensor([20, 40]) / 127.5 - 1)
    for only, name in ((None, "a"), ([0], "a"), ([2], "c")):
        with pytest.raises(UserError, match=f"no images of the class {name}"):
            train_ddpm.load_data_of(checkpoint, only=only)


def test_names_of_classes(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    classes = ["Cat", "black, cat", "cat", composed, "goldfish, Carassius auratus"]
    for name, i in (("cat", 2), ("Black, Cat", 1), ("black", 1), (apart, 3), ("GoldFish", 4)):
        assert class_indices([name], classes) == [i]
    assert class_indices(["carassius auratus", "cat", "goldfish"], classes) == [2, 4]
    for name in ("gold", "CAT"):  # none is called so, or more than one
        with pytest.raises(UserError, match=f"'{name}'.* Cat; black, cat; cat"):
            class_indices([name], classes)
    folder_of(tmp_path, f"{apart}/1.png", "b/2.png")
    assert load_dataset("folder", tmp_path)[2]["classes"] == ["b", composed]


def test_mnists_files_with_a_dot_are_read(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, kind, shape in (("images.idx3", 2051, (10, 28, 28)), ("labels.idx1", 2049, (10,))):
        numbers = bytes(i % 10 for i in range(int(np.prod(shape))))
        (raw / f"train-{name}-ubyte").write_bytes(struct.pack(f">{1 + len(shape)}i", kind, *shape)
                                                  + numbers)
    images, labels, _ = load_dataset("mnist", tmp_path)
    assert images.shape == (10, 1, 28, 28) and labels.tolist() == list(range(10))
