"""Whose effort an exam follows when nobody says it."""

from hf_immunize.stages.following import attacked_base


def test_the_base_that_is_named_for_comparison_is_the_one_to_follow_once_it_was_attacked(tmp_path):
    """The lines in the recipes' READMEs name it by base_path alone; certify refuses a model that did not follow."""
    base, beside = tmp_path / "base", tmp_path / "beside"
    assert attacked_base(None, str(base)) is None
    (base / "traces" / "control").mkdir(parents=True)
    assert attacked_base(None, str(base)) == base
    assert attacked_base(beside, base) == base
    (beside / "traces" / "control").mkdir(parents=True)
    assert attacked_base(beside, base) == beside
