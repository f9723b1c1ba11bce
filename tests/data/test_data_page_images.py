"""docs/data.md, its sections on images and rows: code runs as printed, and every claim has a test, named here."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_immunize.data import collate_pixels, labels_of

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "data.md").read_text(encoding="utf-8")

CLAIMS = {
    "data/test_images.py": {
        "by one function": "test_every_reader_gives_the_pixels_an_image_shows",
        "or one grey channel where the model has one":
            "test_every_reader_gives_one_grey_channel_where_one_is_asked_for",
        "the first is used, and how many": "test_the_first_of_several_frames_is_used_and_told",
        "A truncated, empty or missing file": "test_broken_files_are_named_by_every_reader",
        "one of more pixels than Pillow allows":
            "test_missing_files_and_decompression_bombs_have_remedies_of_their_own",
        "all eight of them": "test_sizes_orientations_and_backgrounds_of_any_kind",
        "16-bit grey becomes value/257, rounded": "test_every_reader_gives_the_pixels_an_image_shows",
        "its upper 8": "test_colour_of_sixteen_bits_is_within_one_level_and_told",
        "one line says which part": "test_a_sixteen_bit_grey_png_keeps_its_classes_apart_and_is_told_once",
        "they are refused": "test_sixteen_bit_files_that_hold_eight_bits_are_refused_rather_than_black",
        "12-bit TIFFs are scaled by 4095": "test_tiff_of_twelve_bits_and_white_is_zero",
        "mode `F`; 32-bit integers": "test_what_cannot_be_known_is_refused_by_every_reader",
        "What a transparent part hides is never seen":
            "test_black_ink_on_a_clear_background_shows_and_a_cut_out_hides_its_colour",
        "A clear colour in a 16-bit colour PNG is refused": "test_a_clear_colour_of_sixteen_bits_is_refused",
        "from palette, CMYK, YCbCr, LAB or HSV": "test_colour_models_of_tiffs_and_jpegs",
        "Colour profiles are not": "test_colour_profiles_are_not_applied",
        "the format of the rows is passed over": "test_every_reader_gives_the_pixels_an_image_shows",
        "`uint8` array, tensor or column": "test_columns_of_arrays_and_of_paths_are_read",
        "16 bits, value/257": "test_arrays_and_tensors_of_every_type_and_layout",
        "An axis of 3 or 1 counts before": "test_three_or_one_channels_count_before_four_or_two",
        "NaN, infinity, `None` and tuples are refused": "test_values_that_are_no_image_say_what_to_do",
    },
    "data/test_images_unchanged.py": {
        "keep their pixels, content hashes and fingerprints": "test_fingerprints_of_the_digits",
    },
    "diffusion/test_concept_tasks.py": {
        "An `.npz` is read as a whole": "test_grey_archives_of_every_type_and_layout",
        "or with alpha": "test_colour_archives_of_every_layout",
        "Integers that are all 0 or 1": "test_archives_whose_levels_cannot_be_known_are_refused",
    },
    "data/test_processors.py": {
        "the central square of that side": "test_the_central_square_of_a_processor_without_crop_is_used_and_told_once",
        "images of two sizes are an error": "test_two_sizes_without_resizing_name_both_rows_and_files",
        "One number in `image_mean`": "test_a_processor_for_one_channel_gets_grey_images",
        "are repeated where they are equal":
            "test_equal_means_serve_another_number_of_channels_and_different_ones_are_refused",
    },
    "diffusion/test_photos.py": {
        "are counted and named in one line": "test_files_that_are_not_read_are_counted_and_hidden_ones_never_opened",
        "Captions are `name.txt`": "test_name_txt_beside_each_image_is_its_caption",
        "`metadata.csv`, in the folder or above it": "test_a_table_of_captions_in_csv",
        "images without one are named": "test_images_without_a_caption_are_named_once_one_has_one",
        "captions in two\nplaces are an error": "test_captions_in_two_places_are_refused",
    },
    "training/test_rows_of_users.py": {
        "**Transforms**": "test_a_transform_needs_no_option_and_trains_as_the_same_rows_without_one",
        "**Streams**": "test_streams_tuples_and_mistakes_are_found_when_the_trainer_is_made",
    },
    "data/test_rows.py": {
        "Labels are those that the transform makes": "test_labels_are_those_that_a_transform_makes",
        "an iterator, a `DataLoader`": "test_streams_say_what_is_needed",
        "So is a dict of splits": "test_a_dict_of_splits_says_to_choose_one",
        "**Tuples**": "test_rows_without_names_say_to_return_a_dict",
        "Dict-like rows": "test_any_mapping_is_a_row",
        "**Pixels**": "test_pixels_that_are_none_say_what_to_do",
        "**Files**": "test_a_row_that_cannot_be_read_is_named",
        "what Pillow raises": "test_an_error_inside_pillow_is_a_broken_image",
        "**Mistakes**": "test_a_mistake_in_the_users_code_is_reported_as_that",
        "from a worker as well": "test_workers_show_the_users_own_exception_and_traceback",
        "Of other exceptions both": "test_other_exceptions_may_be_either",
        "pass through as they are": "test_what_is_no_fault_of_a_row_is_never_wrapped",
        "is read one by one": "test_rows_that_fail_together_but_not_one_by_one_are_told",
    },
    "data/test_pixels.py": {
        "spares that": "test_labels_are_found_in_every_kind_of_dataset",
    },
}


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.split(f"## {title}\n")[1], flags=re.M)[0]


@pytest.mark.parametrize("file", CLAIMS)
def test_every_claim_is_on_the_page_and_has_its_test(file):
    page = section("Images") + section("Rows of your own dataset")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for claim, name in CLAIMS[file].items():
        assert claim in page and name in tests, (claim, name)


def test_the_first_example_prints_what_it_says():
    (block,) = re.findall(r"```python\n(.*?)```", section("Images"), flags=re.S)
    said = re.findall(r"print\(.*# (.*)", block)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "data.md", "exec"), {})
    assert printed.getvalue().splitlines() == said and len(said) == 3


def test_the_transform_of_the_page_makes_rows_for_the_trainer(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", section("Rows of your own dataset"), flags=re.S)
    for place in range(6):
        (tmp_path / "images" / "ab"[place % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.full((9, 7), 40 * place, np.uint8))
        image.save(tmp_path / "images" / "ab"[place % 2] / f"{place}.png")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    given = {"MODEL": str(tmp_path / "model"), "FOLDER": str(tmp_path / "images")}
    exec(compile(block, "data.md", "exec"), given)
    rows = given["train_dataset"]
    assert labels_of(rows, "x") == [0, 0, 0, 1, 1, 1]
    batch = collate_pixels([rows[row] for row in range(6)])
    levels = torch.tensor([0.0, 80.0, 160.0, 40.0, 120.0, 200.0])
    assert torch.allclose(batch["pixel_values"][:, 0, 0, 0], levels / 127.5 - 1, atol=1e-6)
