"""What ``init`` and ``immunize`` decide from a model and its data: held-out rows, heads that fit, sizes of images."""

from types import SimpleNamespace

import pytest
from PIL import Image
from pipeline_builders import KINDS, build_text_pipeline
from transformers import ResNetConfig, ViTImageProcessorPil

from hf_immunize.data import HARMFUL_SPLITS, parse_fractions
from hf_immunize.models import load_processor
from hf_immunize.stages.api.places import make_task
from hf_immunize.stages.checks.rows import Side
from hf_immunize.stages.dry_run import image_shape
from hf_immunize.stages.workflow.draft_classifier import splits_with_probe, unknown_outputs


def side(counts):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return Side("harmful", None, "image", range(len(labels)), labels, [str(label) for label in set(labels)],
                HARMFUL_SPLITS)


def test_a_part_of_the_defenders_rows_is_held_out_and_the_attackers_stay_as_they_are():
    found = parse_fractions(splits_with_probe(side([300, 200])))
    assert found == {"defense": 0.25, "probe": 0.1, "attack": 0.35, "validation": 0.1, "test": 0.2}
    order = list(found)
    assert order.index("probe") == 1, "cut out of the defender's rows: those of the others do not move"
    assert sum(found[name] for name in ("defense", "probe")) == pytest.approx(HARMFUL_SPLITS["defense"])


@pytest.mark.parametrize("least, share", [(1000, 0.05), (120, 0.05), (60, 0.1), (30, 0.15)])
def test_small_classes_give_a_larger_share_so_that_about_six_rows_of_each_tell(least, share):
    found = parse_fractions(splits_with_probe(side([least, 1000])))
    assert found["probe"] == pytest.approx(share) and found["defense"] == pytest.approx(0.35 - share)


@pytest.mark.parametrize("counts, held", [
    ([140, 140], True), ([60, 500], True), ([27] * 12, True), ([26, 500], False), ([8, 8], False),
    ([120, 120], False)])  # the last: 36 rows, of which 18 judge
def test_classes_of_few_images_are_all_trained_on(counts, held):
    assert (splits_with_probe(side(counts)) is not None) == held


@pytest.mark.parametrize("rows, share", [(300, 0.15), (360, 0.139), (500, 0.1), (1200, 0.05)])
def test_about_fifty_rows_tell_in_all(rows, share):
    assert parse_fractions(splits_with_probe(side([rows // 3] * 3)))["probe"] == pytest.approx(share)


@pytest.mark.parametrize("outputs, reason", [
    (["Square", "kreis_groß", "Tri-Angle"], None), (["square", "Ku\u0308he", "tri angle"], "'Kreis groß'"),
    (["LABEL_0", "LABEL_1", "LABEL_2"], None), (["LABEL_0", "LABEL_1"], "2 outputs for 3 classes"), (None, "")])
def test_a_head_fits_by_the_names_that_training_matches(outputs, reason):
    """Without regard to case, and to spaces, ``_`` and ``-``."""
    seen = SimpleNamespace(own_labels=None if outputs is None else dict(enumerate(outputs)))
    found = unknown_outputs(seen, SimpleNamespace(names=["Kreis groß", "square", "tri angle"]))
    assert found == reason if reason in (None, "") else reason in found


def test_a_model_of_one_channel_whose_processor_was_made_for_colour(tmp_path):
    ResNetConfig(num_channels=1).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 20}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        tmp_path)
    assert image_shape(load_processor(tmp_path)) == (1, 16, 20)


def test_a_pipeline_that_reads_prompts_sees_photos_of_the_size_that_it_draws(tmp_path):
    pipeline = build_text_pipeline(KINDS[0])
    pipeline.save_pretrained(tmp_path / "pipeline")
    for name in ("keep", "harm"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "0.png")
    sources = {"primary": str(tmp_path / "keep"), "harmful": str(tmp_path / "harm"), "benign": None}
    told = {"retain_prompt": "a", "harmful_prompt": "b"}
    drawn = pipeline.unet.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    assert make_task(tmp_path / "pipeline", tmp_path / "data", sources, told).resolution == drawn != 512
    assert make_task(tmp_path / "pipeline", tmp_path / "data", sources, told | {"resolution": 64}).resolution == 64
