"""Folders of photos: what is read, what is left out and told, and where captions come from."""

from __future__ import annotations

import logging
import unicodedata

import numpy as np
import pytest
from PIL import Image

from hf_immunize.diffusion.photos import image_files, read_captions, read_pixels
from hf_immunize.errors import DataError


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "dog"
    folder.mkdir()
    for place, name in enumerate(("0.png", "1.JPG", "ä.PnG")):
        Image.fromarray(np.full((10, 12, 3), 40 * place, np.uint8)).save(folder / name, quality=100)
    return folder


def write(folder, texts: dict[str, str], encoding: str = "utf-8") -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding=encoding)


def test_name_txt_beside_each_image_is_its_caption(photos):
    """They were ignored before, and the prompt taken for every image."""
    assert read_captions(photos) is None
    write(photos, {"0.txt": "a black dog\n", "1.TXT": "  a grey dog"})
    write(photos, {unicodedata.normalize("NFD", "ä") + ".txt": "a dog, \u00fc"}, "utf-8-sig")
    assert [file.name for file in image_files(photos)] == ["0.png", "1.JPG", "ä.PnG"]
    assert read_captions(photos) == ["a black dog", "a grey dog", "a dog, \u00fc"]


@pytest.mark.parametrize("texts", [{"0.txt": "a", "1.txt": " \n"}, {"0.txt": "a"}])
def test_images_without_a_caption_are_named_once_one_has_one(photos, texts):
    write(photos, texts)
    with pytest.raises(DataError, match=r"in dog, as .txt beside each, got none for \['1.JPG', 'ä.PnG'\]: add"):
        read_captions(photos)


def test_captions_in_two_places_are_refused(photos):
    write(photos, {"0.txt": "a", "metadata.jsonl": '{"file_name": "0.png", "text": "b"}'})
    with pytest.raises(DataError, match=r"one place, got both metadata.jsonl and 1 .txt files \(0.txt\): remove"):
        read_captions(photos)
    write(photos, {"metadata.csv": "file_name,text\n0.png,c\n"})
    with pytest.raises(DataError, match="one file of captions in dog, got metadata.jsonl and metadata.csv"):
        read_captions(photos)
    (photos / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match="got both metadata.csv and 1 .txt files"):
        read_captions(photos)
    write(photos, {"0.TXT": "b"})
    if len(list(photos.glob("0.[tT]*"))) == 2:  # file systems may not tell them apart
        with pytest.raises(DataError, match="one caption for '0' in dog, got several .txt files"):
            read_captions(photos)


def test_a_caption_that_is_no_utf_8_is_named(photos):
    (photos / "0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="expected dog/0.txt in UTF-8"):
        read_captions(photos)


def test_a_table_of_captions_in_csv(photos):
    rows = '\ufefffile_name,text,note\n0.png,"a dog, black",x\n1.JPG,"two\nlines",x\n'
    write(photos, {"metadata.csv": rows + unicodedata.normalize("NFD", "ä.PnG") + ",a\u2028b,x\n"})
    assert read_captions(photos) == ["a dog, black", "two\nlines", "a\u2028b"]
    (photos / "metadata.csv").rename(photos.parent / "metadata.csv")
    above = (photos.parent / "metadata.csv").read_text(encoding="utf-8")
    for name in ("0.png", "1.JPG", unicodedata.normalize("NFD", "ä.PnG")):
        above = above.replace(f"\n{name}", f"\ndog/{name}")
    write(photos.parent, {"metadata.csv": above})
    assert read_captions(photos) == ["a dog, black", "two\nlines", "a\u2028b"]
    write(photos, {"metadata.csv": "file_name,caption\n0.png,a\n"})
    with pytest.raises(DataError, match="like file_name,text in dog/metadata.csv, got .* line 2: KeyError 'text'"):
        read_captions(photos)
    write(photos, {"metadata.csv": "file_name,text\n0.png\n"})
    with pytest.raises(DataError, match="line 2: TypeError file_name and text must be strings"):
        read_captions(photos)
    write(photos, {"metadata.csv": "file_name,text\n0.png,a\n0.png,b\n"})
    with pytest.raises(DataError, match="one caption for '0.png' in dog/metadata.csv, got another in line 3"):
        read_captions(photos)


def test_captions_of_images_that_are_not_there_are_counted(photos, caplog):
    names = ("0.png", "1.JPG", "ä.PnG", "gone.png")
    write(photos, {"metadata.jsonl": "\n".join(f'{{"file_name": "{name}", "text": "a"}}' for name in names)})
    with caplog.at_level(logging.WARNING):
        assert read_captions(photos) == ["a"] * 3
    assert "1 captions in metadata.jsonl are of no image in 'dog': ['gone.png']" in caplog.text


def test_files_that_are_not_read_are_counted_and_hidden_ones_never_opened(photos, caplog):
    before = read_pixels(photos, 8)
    for name in ("a.heic", "b.HEIC", "c.gif", "d.tif", "notes.txt", "raw"):
        (photos / name).write_bytes(b"x")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", ".hidden.jpg"):
        (photos / name).write_bytes(b"Mac OS X")
    (photos / "folder.png").mkdir()
    write(photos, {f"{stem}.txt": "a" for stem in "01ä"})
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_pixels(photos, 8), before)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "6 files in 'dog' are not read (1 (no suffix), 1 .gif, 2 .heic, 1 .tif, 1 .txt), e.g. 'a.heic'" in told[0]
    assert "4 hidden or system files in 'dog' are left out" in told[0]
    assert read_captions(photos) == ["a"] * 3


def test_hidden_files_alone_are_no_warning(photos, caplog):
    (photos / ".DS_Store").write_bytes(b"x")
    with caplog.at_level(logging.INFO, logger="hf_immunize"):
        read_pixels(photos, 8)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "1 hidden or system files in 'dog' are left out.")]


def test_a_folder_without_readable_images_says_what_is_there(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    (tmp_path / "._a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"got none, but 1 .heic: convert them"):
        read_pixels(tmp_path, 8)
    (tmp_path / "a.heic").unlink()
    with pytest.raises(DataError, match="got none: check the path"):
        read_pixels(tmp_path, 8)


def test_clear_parts_show_the_background_and_sixteen_bits_are_scaled(tmp_path, caplog):
    """A cut-out showed its hidden colour, and a palette image its entries."""
    cut = np.full((8, 8, 4), (10, 200, 30, 0), np.uint8)
    Image.fromarray(cut).save(tmp_path / "0.png")
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "1.png")
    with caplog.at_level(logging.WARNING):
        found = read_pixels(tmp_path, 8)
    assert found[0].unique().tolist() == [1.0] and found[1].unique() == pytest.approx(156 / 127.5 - 1)
    assert "1 of 2 images of" in caplog.text and "transparent parts, which show the background: white" in caplog.text
    assert read_pixels(tmp_path, 8, background=(0, 0, 0))[0].unique().tolist() == [-1.0]
    assert read_pixels(tmp_path, 8, channels=1).shape == (2, 1, 8, 8)
    with pytest.raises(DataError, match="1 or 3 channels for the images of .*, got channels=2"):
        read_pixels(tmp_path, 8, channels=2)
