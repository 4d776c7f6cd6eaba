"""What people bring: weights in other formats or broken, images of all kinds, names;
and where results may go."""

import datetime
import json
import os
import pathlib
import pickle
import signal
import struct
import unicodedata
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

import ddpm
import train_ddpm
import vdu
from ddpm import UserError
from train_ddpm import class_indices, load_dataset, load_images, read_image

# --- safetensors ----------------------------------------------------------------------


def safetensors(header, data, padding=0):
    """A file by the rules of the format: length, header, bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * padding
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype, shape, first, last):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


NUMBERS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64,
           "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


@pytest.mark.parametrize("padding", range(4))  # the data need not begin at a multiple of anything
def test_safetensors_are_read_by_the_rules_of_the_format(tmp_path, padding):
    arrays = {k: (np.arange(6).reshape(2, 3) % 2).astype(d) for k, d in NUMBERS.items()}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        header[name] = entry(name, [2, 3], len(data), len(data) + array.nbytes)
        data += array.tobytes()
    bf16 = np.array([0x3FC0, 0xC000], dtype="<u2")  # 1.5 and -2: the upper half of a float32
    header["bf"] = entry("BF16", [2], len(data), len(data) + 4)
    header["none"] = entry("F32", [0, 7], len(data) + 4, len(data) + 4)
    header["one"] = entry("F32", [], len(data) + 4, len(data) + 8)
    data += bf16.tobytes() + struct.pack("<f", 0.25)
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors(header, data, padding))
    before = path.read_bytes()
    tensors = ddpm.read_file(path)
    assert set(tensors) == set(header) - {"__metadata__"}
    for name, array in arrays.items():
        assert torch.equal(tensors[name], torch.from_numpy(array))
        assert tensors[name].numpy().dtype == array.dtype
    assert tensors["bf"].dtype == torch.bfloat16 and tensors["bf"].tolist() == [1.5, -2.0]
    assert tensors["none"].shape == (0, 7) and tensors["one"].item() == 0.25
    tensors["F32"] += 1  # in memory, and not in the file
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [
    b"", b"1234567", safetensors({"a": entry("F32", [1], 0, 4)}, b"123"),
    safetensors({"a": entry("F32", [1], 0, 4)}, b"12345"),
    safetensors({"a": entry("F32", [2], 0, 4)}, b"1234"),
    safetensors({"a": entry("F32", [-1, -1], 0, 4)}, b"1234"),
    safetensors({"a": entry("F31", [1], 0, 4)}, b"1234"),
    safetensors({"a": entry("F32", [1], 4, 8)}, b"12345678"),
    safetensors({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, b"123456"),
    safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"12"),
    safetensors(b"not json", b""), safetensors(b"[]", b""), safetensors({"a": 3}, b""),
    struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 100_000_001) + b"{}",
], ids=range(15))
def test_safetensors_that_do_not_agree_with_themselves_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="x.safetensors is damaged or cut short"):
        ddpm.read_file(tmp_path / "x.safetensors")


def test_safetensors_are_written_by_the_rules_of_the_format(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4).half(), "c": torch.tensor(True),
               "d": torch.randn(5, 2).T, "e": torch.tensor([1.5]).bfloat16()}
    path = tmp_path / "y.safetensors"
    ddpm.write_atomically(path, lambda f: ddpm.write_safetensors(f, tensors, {"k": "v"}))
    content = path.read_bytes()
    n = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + n]), content[8 + n :]
    assert header.pop("__metadata__") == {"k": "v"} and (8 + n) % 8 == 0
    assert sum(b - a for a, b in (e["data_offsets"] for e in header.values())) == len(data)
    for name, code in (("a", "F32"), ("b", "F16"), ("c", "BOOL"), ("d", "F32")):
        first, last = header[name]["data_offsets"]
        array = np.frombuffer(data[first:last], NUMBERS[code]).reshape(header[name]["shape"])
        assert header[name]["dtype"] == code
        assert torch.equal(torch.from_numpy(array.copy()), tensors[name])
    first, last = header["e"]["data_offsets"]
    assert header["e"]["dtype"] == "BF16" and data[first:last] == bytes([0xC0, 0x3F])


# --- checkpoints ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw():
    """The dictionary of a small checkpoint."""
    config = {"unet": dict(model_channels=8, channel_mult=[1], num_heads=1), "schedule": "linear",
              "timesteps": 50, "velocity": False, "image_shape": [1, 8, 8]}
    weights = ddpm.build(config)[0].state_dict()
    std = {k: torch.ones_like(v) for k, v in weights.items()}
    posterior = {"mean": weights, "std": std, "n": 3}
    data = {"name": "mnist", "source": "torchvision", "root": None, "classes": ["0", "1"],
            "excluded": [], "images": 9}
    return {"config": config, "weights": weights, "posterior": posterior, "data": data, "step": 1}


def reload(path, contents):
    torch.save(contents, path)
    return ddpm.load_checkpoint(path)


def test_the_small_checkpoint_is_one(raw, tmp_path):
    assert reload(tmp_path / "x.pt", raw).posterior["n"] == 3


@pytest.mark.parametrize("change", [
    {"config": {}}, {"config": 3}, {"weights": 3}, {"weights": {}}, {"weights": {"out.0.bias": 1}},
    {"posterior": 7}, {"posterior": {"mean": {}, "std": {}, "n": 2}}, {"data": {}}, {"data": None},
    {"step": "many"}, {"forgotten": {"classes": ["1"]}}], ids=str)
def test_right_names_with_wrong_contents(raw, tmp_path, change):
    with pytest.raises(UserError, match="x.pt: what it holds does not fit together"):
        reload(tmp_path / "x.pt", {**raw, **change})


@pytest.mark.parametrize("change", [
    {"schedule": "sideways"}, {"timesteps": 10**12},
    {"unet": dict(model_channels=8, channel_mult=[1], num_res_blocks=10**9)},
    {"unet": dict(model_channels=10**6, channel_mult=[1] * 50)}], ids=lambda c: next(iter(c)))
def test_a_config_that_is_not_of_these_weights(raw, tmp_path, change):
    with pytest.raises(UserError, match="does not fit together"):
        reload(tmp_path / "x.pt", {**raw, "config": {**raw["config"], **change}})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(raw, tmp_path, value):
    broken = {k: v.clone() for k, v in raw["weights"].items()}
    broken["time_embed.2.bias"][3] = value
    with pytest.raises(UserError, match="broken: time_embed.2.bias"):
        reload(tmp_path / "x.pt", {**raw, "weights": broken})
    with pytest.raises(UserError, match="posterior's time_embed.2.bias"):
        reload(tmp_path / "x.pt", {**raw, "posterior": {**raw["posterior"], "std": broken}})


class ByteArray:
    def __reduce__(self):
        return bytearray, (600_000_000,)


def test_what_would_exhaust_the_reader_is_refused(tmp_path):
    torch.save({"weights": ByteArray()}, tmp_path / "bytes.pt")
    content = bytearray(b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.")  # {((((...)))): 1}
    torch.save({"a": 1}, tmp_path / "deep.pt")
    with zipfile.ZipFile(tmp_path / "deep.pt") as old, zipfile.ZipFile(
            tmp_path / "deeper.pt", "w") as new:
        for item in old.namelist():
            new.writestr(item, bytes(content) if item.endswith("data.pkl") else old.read(item))
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("archive/data.pkl", pickle.dumps({}, 2))
        new.writestr("archive/data/0", bytes(5_000_000))
    torch.save({"weights": torch.zeros(1).expand(10**9)}, tmp_path / "stride.pt")
    for name, word in (("bytes", "never needs"), ("deeper", "never needs"),
                       ("small", "compressed"), ("stride", "repeats its numbers")):
        with pytest.raises(UserError, match=f"{name}.pt was refused: .*{word}"):
            ddpm.read_file(tmp_path / f"{name}.pt")


def test_what_trainers_leave_beside_the_weights_is_read_past(tmp_path):
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    beside = {"array": np.arange(3.0), "number": np.float32(2), "rng": np.random.get_state(),
              "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3),
              "when": datetime.datetime.now(), "where": pathlib.PurePosixPath("/tmp")}
    for name, value in beside.items():
        torch.save({"weights": torch.ones(2), name: value}, tmp_path / "x.pt")
        assert ddpm.read_file(tmp_path / "x.pt")["weights"].sum() == 2, name


def test_outputs_are_checked_before_any_work(tmp_path):
    (tmp_path / "old.pt").write_text("")
    (tmp_path / "folder").mkdir()
    ddpm.check_outputs([tmp_path / "new" / "deep" / "x.pt"], overwrite=False)
    assert not (tmp_path / "new").exists()
    for path, overwrite, word in (("old.pt", False, "--overwrite"), ("folder", True, "is a folder"),
                                  ("old.pt/x.pt", True, "cannot be written"),
                                  ("x" * 300, True, "cannot be written")):
        with pytest.raises(UserError, match=word):
            ddpm.check_outputs([tmp_path / "fine.pt", tmp_path / path], overwrite)
    for name in ("x.safetensors", "x.png", "x.JSON"):
        with pytest.raises(UserError, match="ends in .pt"):
            ddpm.check_checkpoint_name(name)


def test_the_first_ctrl_c_waits_and_the_second_does_not():
    with ddpm.StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# --- images ---------------------------------------------------------------------------


def test_sixteen_bits_are_scaled_and_floats_refused(tmp_path):
    values = np.array([[0, 257 * 100], [257 * 200 + 3, 65535]], dtype=np.uint16)
    expected = torch.tensor([[0, 100], [200, 255]], dtype=torch.uint8).expand(3, 2, 2)
    image = Image.fromarray(values)
    for ending in ("png", "tiff"):
        image.save(tmp_path / f"a.{ending}")
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 65535\n" + values.astype(">u2").tobytes())
    for ending in ("png", "tiff", "pgm"):
        assert torch.equal(read_image(tmp_path / f"a.{ending}", 2), expected), ending
    for mode in ("F", "I"):
        Image.new(mode, (2, 2)).save(tmp_path / "b.tiff")
        with pytest.raises(UserError, match="b.tiff .*32-bit"):
            read_image(tmp_path / "b.tiff", 2)


def test_what_is_transparent_lies_on_white(tmp_path):
    logo = np.zeros((2, 2, 4), dtype=np.uint8)
    logo[0, 0, 3] = 255  # one black pixel
    Image.fromarray(logo).save(tmp_path / "logo.png")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=1)
    for name in ("logo", "palette"):
        image = read_image(tmp_path / f"{name}.png", 2)
        assert image[:, 0, 0].tolist() == [0] * 3
        assert (image.flatten(1)[:, 1:] == 255).all()


def test_images_stand_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.jpg", 8).float()
    assert image[:, 4:].mean() > 250 and image[:, :4].mean() < 5


def test_an_image_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="cannot read the image .*big.png"):
        read_image(tmp_path / "big.png", 8)
    (tmp_path / "broken.png").write_bytes((tmp_path / "big.png").read_bytes()[:50])
    with pytest.raises(UserError, match="cannot read the image .*broken.png"):
        read_image(tmp_path / "broken.png", 8)


def folder_of(tmp_path, *names):
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.full((3, 8, 8), 0.1 * (i + 1)), tmp_path / name)
    return tmp_path


def test_hidden_files_and_other_endings(tmp_path, capsys):
    folder_of(tmp_path, "a/1.png", "a/.hidden.png", ".cache/2.png", "a/.cache/3.png")
    (tmp_path / "a" / "folder.png").mkdir()
    for name in ("x.gif", "y.heic", "z.heic"):
        (tmp_path / "a" / name).write_bytes(b"")
    assert load_images(tmp_path / "a", (1, 8, 8)).shape == (1, 1, 8, 8)
    assert "passing over 3 files, by their endings (.gif, .heic)" in capsys.readouterr().out
    assert load_dataset("folder", tmp_path)[2]["classes"] == ["a"]


@pytest.mark.parametrize("train, test", [("Train", "Test"), ("training", "validation"),
                                         ("train", "val")])
def test_parts_of_a_folder(tmp_path, capsys, train, test):
    folder = folder_of(tmp_path, f"{train}/a/1.png", f"{train}/b/2.png", f"{test}/b/3.png",
                       f"{train}/loose.png")
    images, labels, data = load_dataset("folder", folder)
    assert data["classes"] == ["a", "b"] and labels.tolist() == [0, 1]
    assert "passing over 1 images that lie in no class's folder" in capsys.readouterr().out
    # a test part that lacks a class has the others
    assert load_dataset("folder", folder, train=False)[1].tolist() == [1]


def test_one_class_is_read_where_the_others_are_gone(raw, tmp_path):
    folder = folder_of(tmp_path / "photos", "b/1.png", "b/2.png")
    (folder / "c").mkdir()
    data = {**raw["data"], "name": "folder", "source": "folder", "root": str(folder),
            "classes": ["a", "b", "c"]}
    checkpoint = reload(tmp_path / "x.pt", {**raw, "data": data})
    images, labels = train_ddpm.load_data_of(checkpoint, only=[1])
    assert images.shape == (2, 1, 8, 8) and labels.tolist() == [1, 1]
    args = SimpleNamespace(seed=0, forget_images=None, data_root=None, share=0.3,
                           forget_samples=None)
    forget, rho = vdu.load_forget_images(args, checkpoint, [1])
    expected = torch.tensor([0.1, 0.2]).mul(255).round() / 127.5 - 1
    assert torch.allclose(forget.mean((1, 2, 3)).sort().values, expected, atol=0.01) and rho == 0.3
    for only, word in ((None, "no images of the class c"), ([0], "the classes in .* are b, c"),
                       ([2], "no images of the class c")):
        with pytest.raises(UserError, match=word):
            train_ddpm.load_data_of(checkpoint, only=only)


def test_grey_keeps_its_levels(tmp_path):
    levels = torch.arange(256).view(1, 16, 16).expand(3, 16, 16) / 255
    save_image(levels, tmp_path / "a.png")
    assert load_images(tmp_path, (1, 16, 16)).flatten().tolist() == list(range(256))


# --- names ----------------------------------------------------------------------------


def test_names_of_classes(tmp_path):
    composed = unicodedata.normalize("NFC", "caf\u00e9")
    data = {"classes": ["Cat", "black, cat", "cat", composed]}
    assert class_indices([unicodedata.normalize("NFD", composed)], data) == [3]
    assert class_indices(["cat"], data) == [2] and class_indices(["Black, Cat"], data) == [1]
    with pytest.raises(UserError, match="no class 'black'"):
        class_indices(["black"], data)
    with pytest.raises(UserError, match="'CAT' could be Cat or cat"):
        class_indices(["CAT"], data)
    folder_of(tmp_path, unicodedata.normalize("NFD", composed) + "/1.png", "b/2.png")
    assert load_dataset("folder", tmp_path)[2]["classes"] == ["b", composed]


def test_a_run_on_the_shipped_images_resumes_where_mnist_is_there(monkeypatch):
    monkeypatch.setitem(train_ddpm.LOADERS, "mnist", lambda *args: pytest.fail("all of MNIST"))
    args = SimpleNamespace(dataset="mnist", data_root=None, image_size=None, exclude_class=["3"])
    images, data = train_ddpm.training_images(args, {"data": {"source": "mnist_5k.npz"}})
    assert len(images) == 4500 and data["counts"][3] == 0 and data["name"] == "mnist"


# --- MNIST's own files ----------------------------------------------------------------


def write_idx(folder, part, images, labels):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}-images-idx3-ubyte").write_bytes(
        struct.pack(">4i", 2051, images, 28, 28) + bytes(images * 784))
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, labels)
                                                       + bytes(labels))


@pytest.mark.parametrize("damage", ["empty", "short", "other part"])
def test_damaged_mnist_is_said_to_be_damaged(tmp_path, damage):
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, "train", 10_000 if damage == "other part" else 20, 10_000)
    write_idx(raw, "t10k", 20, 20)
    if damage == "empty":
        (raw / "train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(UserError, match="MNIST in .* is damaged, or not all there"):
        load_dataset("mnist", tmp_path)
