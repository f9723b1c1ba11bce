"""Every reader of images against the pixels an image was made of: any mode, depth, transparency and orientation."""

from __future__ import annotations

import colorsys
import io
import logging

import numpy as np
import pytest
import torch
from datasets import Array3D, Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from image_kinds import NO_ORIENTATION, ORIENTED, WHITE, composite, grey, grey_of, kinds, png_16, sixteen
from PIL import Image as PILImage
from PIL import ImageCms, PngImagePlugin

from hf_immunize.data import ImageFault, ImageTally, convert_image, decode_image, preprocess, read_image
from hf_immunize.diffusion.photos import read_pixels
from hf_immunize.diffusion.tasks import ConceptArguments, read_images
from hf_immunize.errors import ConfigError, DataError

NAMES = sorted(kinds(np.random.default_rng(0), 2, 2))
HELD: list[Dataset] = []


def held() -> Dataset:
    """What ``builder:test_images:held`` gives a concept task."""
    return HELD[-1]


def table(files: list[bytes | str], decode: bool = True) -> Dataset:
    features = Features({"image": Image(decode=decode), "label": Value("int64")})
    rows = [{"bytes": None, "path": file} if isinstance(file, str) else {"bytes": file, "path": None} for file in files]
    return Dataset.from_dict({"image": rows, "label": list(range(len(rows)))}, features)


def as_is(images, return_tensors):
    """An image processor that changes nothing."""
    arrays = [np.atleast_3d(np.asarray(image)) for image in images]
    return {"pixel_values": torch.stack([torch.tensor(array).permute(2, 0, 1).float() for array in arrays])}


def from_rows(rows, folder, file) -> np.ndarray:
    return np.asarray(read_image(rows, 0, "image", "x"))


READERS = {
    "read_image": lambda file, folder: from_rows(table([file]), folder, file),
    "read_image of a path": lambda file, folder: from_rows(table([written(file, folder)]), folder, file),
    "read_image, not decoded": lambda file, folder: from_rows(table([file], decode=False), folder, file),
    "read_image, torch format": lambda file, folder: from_rows(table([file]).with_format("torch"), folder, file),
    "read_image, numpy format": lambda file, folder: from_rows(table([file]).with_format("numpy"), folder, file),
    "read_image of a PIL image": lambda file, folder: from_rows(
        [{"image": PILImage.open(io.BytesIO(file))}], folder, file),
    "read_image of a path in a row": lambda file, folder: from_rows([{"image": written(file, folder)}], folder, file),
    "preprocess": lambda file, folder: preprocess(
        table([file]), as_is, label_names=["a"], name="x").pixel_values[0].permute(1, 2, 0).numpy(),
    "read_pixels": lambda file, folder: photo_levels(file, folder, 3),
    "read_images of a concept task": lambda file, folder: concept(file, 3),
}
GREY_READERS = {
    "read_image": lambda file, folder: np.asarray(read_image(table([file]), 0, "image", "x", mode="L")),
    "preprocess": lambda file, folder: preprocess(
        table([file]), as_is, label_names=["a"], name="x", channels=1).pixel_values[0, 0].numpy(),
    "read_pixels": lambda file, folder: photo_levels(file, folder, 1)[..., 0],
    "read_images of a concept task": lambda file, folder: concept(file, 1),
}


def written(file: bytes, folder) -> str:
    for old in folder.glob("*"):
        old.unlink()
    (folder / "a.png").write_bytes(file)
    return str(folder / "a.png")


def photo_levels(file: bytes, folder, channels: int) -> np.ndarray:
    written(file, folder)
    size = PILImage.open(io.BytesIO(file)).size[0]
    return np.rint((read_pixels(folder, size, channels=channels)[0].permute(1, 2, 0).numpy() + 1) * 127.5)


def concept(file: bytes, channels: int) -> np.ndarray:
    HELD.append(table([file]))
    size = PILImage.open(io.BytesIO(file)).size[0]
    source = ConceptArguments(f"builder:{__name__}:held", image_size=size, channels=channels)
    return read_images(source).images[0]


def made(draw_name: str, seed: int, size: int):
    return kinds(np.random.default_rng(seed), size, size)[draw_name]


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 10**6), size=st.integers(2, 6), orientation=st.integers(1, 8))
def test_every_reader_gives_the_pixels_an_image_shows(reader, tmp_path_factory, name, seed, size, orientation):
    image, orientation = made(name, seed, size), 1 if name in NO_ORIENTATION else orientation
    found = READERS[reader](image.file(orientation), tmp_path_factory.mktemp("one"))
    assert np.array_equal(found, ORIENTED[orientation](image.truth))


@pytest.mark.parametrize("reader", GREY_READERS)
@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 10**6), size=st.integers(2, 6))
def test_every_reader_gives_one_grey_channel_where_one_is_asked_for(reader, tmp_path_factory, name, seed, size):
    image = made(name, seed, size)
    found = GREY_READERS[reader](image.file(), tmp_path_factory.mktemp("one"))
    assert np.array_equal(found, grey_of(image.truth))


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), height=st.integers(1, 9), width=st.integers(1, 9), orientation=st.integers(1, 8),
       background=st.tuples(*[st.integers(0, 255)] * 3))
def test_sizes_orientations_and_backgrounds_of_any_kind(name, height, width, orientation, background):
    rng = np.random.default_rng(height * 10 + width)
    image = kinds(rng, height, width)[name]
    orientation = 1 if name in NO_ORIENTATION else orientation
    found = np.asarray(decode_image(image.file(orientation), background=background))
    shown = ORIENTED[orientation](image.truth)
    if name.startswith(("LA", "RGBA")):
        alpha = ORIENTED[orientation](np.asarray(image.image)[..., -1])
        colour = ORIENTED[orientation](np.asarray(image.image)[..., :-1])
        colour = np.repeat(colour, 3, axis=-1) if colour.shape[-1] == 1 else colour
        shown = composite(colour, alpha, background)
    elif "clear" in name or "alpha" in name or name == "P GIF":
        return  # on white only: the truth of the others is in image_kinds
    assert np.array_equal(found, shown)


def test_a_sixteen_bit_grey_png_keeps_its_classes_apart_and_is_told_once(caplog):
    """Class centres 1584 and 2283 of 65535 were both 255 everywhere before."""
    levels = [np.full((8, 8), value, np.uint16) for value in (1584, 2283) * 3]
    files = []
    for array in levels:
        buffer = io.BytesIO()
        PILImage.fromarray(array).save(buffer, "PNG")
        files.append(buffer.getvalue())
    with caplog.at_level(logging.WARNING):
        pixels = preprocess(table(files), as_is, label_names=list("abcdef"), name="scans").pixel_values
    assert pixels.unique().tolist() == [6.0, 9.0] and pixels[0].unique() == 6
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "6 of 6 images of scans are scaled" in told[0] and "2.4 to 3.5 % of it" in told[0] and "value/257" in told[0]


def test_sixteen_bit_files_that_hold_eight_bits_are_refused_rather_than_black():
    buffer = io.BytesIO()
    PILImage.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 4).save(buffer, "PNG")
    with pytest.raises(DataError, match=r"in scans, got at most 0.38 % of it: .* save them as 8-bit images \(uint8\)"):
        preprocess(table([buffer.getvalue()]), as_is, label_names=["a"], name="scans")


@pytest.mark.parametrize("colour,bands", [(2, 3), (6, 4), (4, 2)], ids=["RGB", "RGBA", "LA"])
def test_colour_of_sixteen_bits_is_within_one_level_and_told(colour, bands, caplog):
    values = np.random.default_rng(0).integers(0, 4000, (5, 7, bands))
    if bands != 3:
        values[..., -1] = 65535
    file = png_16(values, colour)
    shown = values[..., :3] if bands > 2 else np.repeat(values[..., :1], 3, axis=-1)
    tally = ImageTally()
    found = np.asarray(decode_image(file, tally=tally)).astype(int)
    assert np.abs(found - sixteen(shown)).max() <= 1
    with caplog.at_level(logging.WARNING):
        tally.tell("x", "white")
    assert "1 of 1 images of x are scaled" in caplog.text


def test_colour_models_of_tiffs_and_jpegs():
    cmyk = np.random.default_rng(1).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    ink = cmyk.astype(float) / 255
    shown = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    image = PILImage.fromarray(cmyk, "CMYK")
    for file_format, options, most in (("TIFF", {}, 1), ("JPEG", {"quality": 100, "subsampling": 0}, 6)):
        buffer = io.BytesIO()  # Pillow writes JPEGs as Adobe does: inverted, with its marker
        image.save(buffer, file_format, **options)
        assert np.abs(np.asarray(decode_image(buffer.getvalue())).astype(float) - shown).max() <= most
    for mode, value, rgb in (
        ("YCbCr", (76, 85, 255), (254, 0, 0)), ("HSV", (85, 255, 200), (0, 200, 0)),
        ("LAB", (255, 128, 128), (255, 255, 255)), ("LAB", (0, 128, 128), (0, 0, 0)), ("RGBX", (9, 8, 7, 6), (9, 8, 7)),
    ):
        one = PILImage.new(mode, (3, 2), value)
        assert np.abs(np.asarray(convert_image(one)).astype(int) - rgb).max() <= 2, mode
        assert np.abs(np.asarray(convert_image(one, "L")).astype(int) - grey_of(np.array([[rgb]]))).max() <= 2, mode
    hue = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(30 / 255, 0.5, 0.8))
    found = np.asarray(convert_image(PILImage.new("HSV", (1, 1), (30, 128, 204))))[0, 0].astype(int)
    assert np.abs(found - hue).max() <= 2


def test_premultiplied_alpha_and_palettes_with_alpha():
    colour, alpha = np.array([200, 100, 40]), 128
    straight = composite(colour[None, None], np.array([[alpha]]))[0, 0].astype(int)
    scaled = tuple(int(part) for part in np.rint(colour * alpha / 255)) + (alpha,)
    found = np.asarray(convert_image(PILImage.new("RGBa", (1, 1), scaled)))[0, 0].astype(int)
    assert np.abs(found - straight).max() <= 1
    found = np.asarray(convert_image(PILImage.new("La", (1, 1), (50, 128))))[0, 0].astype(int)
    assert np.abs(found - (50 + 255 * 127 / 255)).max() <= 1
    indexed = PILImage.new("PA", (2, 1), (0, 255))
    indexed.putpalette([10, 20, 30] * 256)
    indexed.putpixel((1, 0), (0, 0))
    assert np.asarray(convert_image(indexed)).tolist() == [[[10, 20, 30], list(WHITE)]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "I;16", "RGB"])
def test_the_image_of_the_user_stays_as_it_is(mode):
    image = PILImage.new(mode, (3, 3))
    image.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
    before = (image.mode, image.tobytes(), dict(image.info), None if mode != "P" else image.palette.mode)
    convert_image(image)
    assert before == (image.mode, image.tobytes(), dict(image.info), None if mode != "P" else image.palette.mode)


def test_black_ink_on_a_clear_background_shows_and_a_cut_out_hides_its_colour(caplog):
    drawing = np.zeros((4, 4, 2), np.uint8)
    drawing[1, 1, 1] = 255
    found = np.asarray(convert_image(PILImage.fromarray(drawing), "L"))
    assert found[1, 1] == 0 and (np.delete(found, 5) == 255).all()
    cut = np.full((4, 4, 4), (10, 200, 30, 0), np.uint8)
    assert (np.asarray(convert_image(PILImage.fromarray(cut), background="#102030")) == (16, 32, 48)).all()
    buffer = io.BytesIO()
    PILImage.fromarray(cut).save(buffer, "PNG")
    with caplog.at_level(logging.WARNING):
        data = preprocess(table([buffer.getvalue()]), as_is, label_names=["a"], name="cut-outs", background="black")
    assert data.pixel_values.unique().tolist() == [0.0]
    assert "1 of 1 images of cut-outs have transparent parts, which show the background: black." in caplog.text


@pytest.mark.parametrize("background", ["no colour", (1, 2), (0, 0, 300), None, "#00000000"])
def test_a_background_that_is_no_colour_is_refused(background):
    with pytest.raises(ConfigError, match="expected a background like 'white'"):
        convert_image(PILImage.new("L", (2, 2)), background=background)
    with pytest.raises(ConfigError, match="mode 'RGB' or 'L', got 'CMYK'"):
        convert_image(PILImage.new("L", (2, 2)), "CMYK")


@pytest.mark.parametrize("image,message", [
    (PILImage.new("F", (3, 3), 0.5), "mode F, floating-point values whose range cannot be known: save it with 8 bits"),
    (PILImage.new("I", (3, 3), 70000), r"mode I, integers of 32 bits in 70000..70000, whose range cannot be known"),
    (PILImage.new("I", (3, 3), -1), r"in -1..-1, whose range cannot be known"),
    (PILImage.new("I", (3, 3), 200), r"in 200..200, which 8 or 16 bits could mean"),
    (PILImage.new("RGB", (0, 3)), r"an image of size \(0, 3\)"),
])
def test_what_cannot_be_known_is_refused_by_every_reader(image, message, tmp_path):
    with pytest.raises(ImageFault, match=message):
        convert_image(image)
    with pytest.raises(DataError, match=rf"an image in row 0 of x, got .*{message}"):
        read_image([{"image": image}], 0, "image", "x")
    if min(image.size):
        buffer = io.BytesIO()
        image.save(buffer, "TIFF")
        for read in (lambda: preprocess(table([buffer.getvalue()]), as_is, label_names=["a"], name="x"),
                     lambda: concept(buffer.getvalue(), 1)):
            with pytest.raises(DataError, match=rf"an image in row 0 of .*, got .*{message}"):
                read()
        with pytest.raises(DataError, match=rf"a readable image, got 'a.png': .*{message}"):
            photo_levels(buffer.getvalue(), tmp_path, 3)


def truncated(file_format: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    PILImage.fromarray(noise).save(buffer, file_format)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


@pytest.mark.parametrize("file", [b"", b"no image", *(truncated(kind) for kind in ("PNG", "JPEG", "TIFF", "BMP"))],
                         ids=["empty", "text", "PNG", "JPEG", "TIFF", "BMP"])
def test_broken_files_are_named_by_every_reader(file, tmp_path):
    path = written(file, tmp_path)
    for read in (lambda: preprocess(table([path]), as_is, label_names=["a"], name="x"),
                 lambda: read_image([{"image": path}], 0, "image", "x")):
        with pytest.raises(DataError, match=r"an image in row 0 of x \(.*a\.png\), got .*: remove or replace it"):
            read()
    with pytest.raises(DataError, match="a readable image, got 'a.png': .*: remove or replace it"):
        read_pixels(tmp_path, 8)


def test_missing_files_and_decompression_bombs_have_remedies_of_their_own(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"row 0 of x \(.*none\.png\), got FileNotFoundError.*: check the path"):
        read_image(table([str(tmp_path / "none.png")]), 0, "image", "x")
    buffer = io.BytesIO()
    PILImage.new("L", (100, 100)).save(buffer, "PNG")
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="DecompressionBombError.*: shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"):
        read_image(table([buffer.getvalue()]), 0, "image", "x")


@pytest.mark.parametrize("file_format,options", [("GIF", {}), ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_the_first_of_several_frames_is_used_and_told(file_format, options, tmp_path, caplog):
    frames = [PILImage.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, file_format, save_all=True, append_images=frames[1:], **options)
    with caplog.at_level(logging.WARNING):
        data = preprocess(table([buffer.getvalue()]), as_is, label_names=["a"], name="moving")
    assert data.pixel_values[0, :, 0, 0].tolist() == [255.0, 0.0, 0.0]
    assert "1 of 1 images of moving hold several frames or pages: the first of each is used." in caplog.text


def test_an_animation_of_the_user_stays_at_its_frame():
    frames = [PILImage.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    opened = PILImage.open(buffer)
    for frame, colour in ((0, (255, 0, 0)), (2, (0, 0, 255))):
        opened.seek(frame)
        assert convert_image(opened).getpixel((0, 0)) == colour and opened.tell() == frame
        assert convert_image(opened).getpixel((0, 0)) == opened.convert("RGB").getpixel((0, 0)) == colour


def test_one_frame_and_ordinary_images_say_nothing(caplog):
    files = [kinds(np.random.default_rng(0), 4, 4)[name].file() for name in ("L", "RGB", "1", "P")]
    with caplog.at_level(logging.INFO):
        preprocess(table(files), as_is, label_names=list("abcd"), name="plain")
    assert not [record for record in caplog.records if record.name.startswith("hf_immunize")]


def test_tiff_of_twelve_bits_and_white_is_zero():
    values = np.array([[0, 2048, 4095, 1000]], np.uint16)
    packed = bytearray()
    for one, other in values.reshape(-1, 2).tolist():
        packed += bytes([one >> 4, (one & 15) << 4 | other >> 8, other & 255])
    assert np.asarray(decode_image(tiff(bytes(packed), 4, 1, bits=12), "L")).tolist() == [
        np.rint(values[0] / 4095 * 255).astype(int).tolist()]
    raw = np.array([[0, 65535, 257, 1000]], "<u2")
    found = np.asarray(decode_image(tiff(raw.tobytes(), 4, 1, bits=16, photometric=0), "L"))
    assert found.tolist() == [sixteen(65535 - raw.astype(int))[0].tolist()]


def tiff(data: bytes, width: int, height: int, bits: int, photometric: int = 1) -> bytes:
    """A little-endian TIFF of one strip, with nothing but what has to be there."""
    import struct

    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
            (273, 4, 8 + 2 + 9 * 12 + 4), (277, 3, 1), (278, 3, height), (279, 4, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0) + data


@settings(max_examples=150, deadline=None)
@given(data=st.data(), height=st.integers(5, 8), width=st.integers(5, 8), bands=st.sampled_from([0, 1, 2, 3, 4]),
       dtype=st.sampled_from(["uint8", "uint16", ">u2", "bool", "int64", "int32", "float32", "float64", "bfloat16"]),
       first=st.booleans(), tensor=st.booleans())
def test_arrays_and_tensors_of_every_type_and_layout(data, height, width, bands, dtype, first, tensor):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    shape = (height, width, bands) if bands else (height, width)
    levels = rng.integers(0, 256, shape)
    values, truth = {
        "uint8": lambda: (levels.astype(np.uint8), levels),
        "uint16": lambda: ((found := rng.integers(0, 65536, shape).astype(np.uint16)), np.rint(found / 257)),
        ">u2": lambda: ((found := rng.integers(0, 65536, shape).astype(">u2")), np.rint(found / 257)),
        "bool": lambda: (levels > 127, (levels > 127) * 255),
        "int64": lambda: (levels, levels),
        "int32": lambda: (levels.astype(np.int32), levels),
        "float32": lambda: ((levels / 255).astype(np.float32), levels),
        "float64": lambda: (levels / 255, levels),
        "bfloat16": lambda: ((kept := np.where(levels > 127, 1.0, 0.5)), np.rint(kept * 255)),
    }[dtype]()
    if bands and first:
        values = np.moveaxis(values, -1, 0)
    if (tensor and dtype != ">u2") or dtype == "bfloat16":
        values = torch.tensor(values, dtype=getattr(torch, dtype))
    seen = np.asarray(truth).astype(np.uint8)
    if bands == 0 or bands == 1:
        wanted = grey(seen.reshape(height, width))
    elif bands == 2:
        wanted = composite(grey(seen[..., 0]), seen[..., 1])
    else:
        wanted = seen if bands == 3 else composite(seen[..., :3], seen[..., 3])
    assert np.array_equal(np.asarray(read_image([{"image": values}], 0, "image", "x")), wanted)
    assert np.array_equal(np.asarray(decode_image(values.tolist() if dtype == "int64" else values)), wanted)


@pytest.mark.parametrize("shape,size", [((4, 4, 3), (4, 4)), ((3, 4, 4), (4, 4)), ((1, 4, 4), (4, 4)),
                                        ((4, 5, 1), (5, 4)), ((2, 9, 3), (9, 2)), ((4, 9, 9), (9, 9))])
def test_three_or_one_channels_count_before_four_or_two(shape, size):
    assert decode_image(np.zeros(shape, np.uint8)).size == size


@pytest.mark.parametrize("value,message", [
    (np.zeros((3, 9, 3), np.uint8), r"shape \(3, 9, 3\), whose first and last axis could be channels: give"),
    (np.zeros((9, 9, 5), np.uint8), r"an array of shape \(9, 9, 5\)"),
    (np.zeros((1, 3, 9, 9), np.uint8), r"an array of shape \(1, 3, 9, 9\)"),
    (np.zeros((0, 9), np.uint8), r"an array of shape \(0, 9\)"),
    (np.full((9, 9), 300), r"int64 values in 300..300: bring them to 0..255 \(or convert 16 bits to uint16\)"),
    (np.full((9, 9), -1.5), r"float64 values in -1.5..-1.5: bring them to 0..1 \(or convert levels .* to uint8\)"),
    (np.full((9, 9), 200.0), r"float64 values in 200..200: bring them to 0..1"),
    (np.full((9, 9), np.nan), "NaN or infinity among its values"),
    (torch.full((3, 9, 9), float("inf")), "NaN or infinity among its values"),
    (np.full((9, 9), "a"), "values of type <U1"),
    ([[1, 2], [3]], "list .*: give one array of numbers for each image"),
    (None, "nothing: remove the row, or give it an image"),
    ((np.zeros((9, 9)), 1), r"a tuple of \['ndarray', 'int'\]: give one image"),
    ({"bytes": None, "path": None}, "give the bytes of a file or its path"),
    ({}, "give the bytes of a file or its path"),
])
def test_values_that_are_no_image_say_what_to_do(value, message):
    with pytest.raises(DataError, match=f"an image in row 0 of x, got .*{message}"):
        read_image([{"image": value}], 0, "image", "x")


def test_columns_of_arrays_and_of_paths_are_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 9)).astype(np.uint8)
    arrays = Dataset.from_dict({"image": list(pixels)}, Features({"image": Array3D((3, 8, 9), "uint8")}))
    PILImage.fromarray(np.moveaxis(pixels[0], 0, -1)).save(tmp_path / "ö.PNG")
    paths = Dataset.from_dict({"image": [str(tmp_path / "ö.PNG")]})
    for rows in (arrays, arrays.with_format("torch"), arrays.with_format("numpy"), paths):
        assert np.array_equal(np.asarray(read_image(rows, 0, "image", "x")), np.moveaxis(pixels[0], 0, -1))


def test_a_feature_that_asks_for_grey_gets_grey():
    rows = table([kinds(np.random.default_rng(0), 5, 5)["RGB"].file()])
    truth = kinds(np.random.default_rng(0), 5, 5)["RGB"].truth
    found = read_image(rows.cast_column("image", Image(mode="L")), 0, "image", "x")
    assert np.array_equal(np.asarray(found), grey(grey_of(truth)))


def test_formats_may_change_after_a_row_was_read():
    rows = table([kinds(np.random.default_rng(0), 5, 5)["RGB"].file()])
    read_image(rows, 0, "image", "x")
    rows.set_transform(lambda batch: {"image": [PILImage.new("RGB", (2, 2), "red") for _ in batch["image"]]})
    assert read_image(rows, 0, "image", "x").size == (2, 2)
    rows.set_transform(lambda batch: {"pixel_values": [0 for _ in batch["image"]]})
    with pytest.raises(DataError, match=r"'image' in row 0 of x, got \['pixel_values'\]: .*with_format\(None\)"):
        read_image(rows, 0, "image", "x")


def test_a_clear_colour_of_sixteen_bits_is_refused():
    file = png_16(np.full((4, 4, 3), 300), 2)
    buffer = io.BytesIO(file[:-12])
    buffer.seek(33)  # tRNS comes after the header and before the pixels
    rest, chunk = buffer.read(), io.BytesIO()
    PngImagePlugin.putchunk(chunk, b"tRNS", b"\x01\x2c" * 3)
    with pytest.raises(ImageFault, match="16 bits a channel with a transparent colour: save it with an alpha channel"):
        decode_image(file[:33] + chunk.getvalue() + rest + file[-12:])


def test_colour_profiles_are_not_applied():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG", icc_profile=swapped)
    assert np.array_equal(np.asarray(decode_image(buffer.getvalue())), pixels)
