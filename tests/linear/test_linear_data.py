"""The paper's data from a folder and through datasets, and the recipe that runs on them."""

import json
import runpy
from pathlib import Path

import numpy as np
import pandas
import pytest
from linear_builders import shared_folder

from hf_immunize.errors import ConfigError, DataError
from hf_immunize.linear import METHODS, LinearImmunizer, LinearTask, load_house_prices, load_mnist, slant_labels

ROOT = Path(__file__).resolve().parents[2]
RECIPE = runpy.run_path(str(ROOT / "recipes" / "linear.py"))


def houses(count=12, seed=0):
    generator = np.random.default_rng(seed)
    return pandas.DataFrame(
        {
            "Id": range(count),
            "MSZoning": ["RL", "RM"] * (count // 2),
            "LotFrontage": np.where(np.arange(count) % 5 == 0, np.nan, generator.normal(size=count)),
            "Alley": [None, "Pave", "Grvl"] * (count // 3),
            "Constant": 3,
            "LotArea": generator.normal(size=count),
            "SalePrice": generator.normal(size=count),
        }
    )


@pytest.fixture
def house_folder(tmp_path):
    table = houses(24)
    table[table.MSZoning != "RL"].to_csv(tmp_path / "D1.csv", index=False)
    table[table.MSZoning == "RL"].to_csv(tmp_path / "D2.csv", index=False)
    table.to_csv(tmp_path / "all.csv", index=False)
    return tmp_path


def test_folder_and_datasets_give_the_same_rows(house_folder):
    by_folder = load_house_prices(house_folder, rows=5)
    by_datasets = load_house_prices(dataset=str(house_folder / "all.csv"), rows=5)
    for one, two in zip(by_folder, by_datasets, strict=True):
        np.testing.assert_allclose(one.features, two.features)
        np.testing.assert_allclose(one.labels, two.labels)
        assert one.features.shape == (5, 5) and one.held_out_features.shape == (7, 5)


def test_columns_are_encoded_and_standardized_over_the_whole_table(house_folder):
    task = load_house_prices(house_folder, rows=None)[0]
    assert task.held_out_labels.shape == (0,)
    np.testing.assert_allclose(task.features.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(task.features.std(axis=0, ddof=1), [1, 0, 1, 1, 0], atol=1e-12)
    alley = pandas.read_csv(house_folder / "D1.csv").Alley.fillna("0").rank(method="dense")
    assert abs(np.corrcoef(alley, task.features[:, 3])[0, 1]) == pytest.approx(1)


def test_rows_equal_those_of_the_reference():
    arrays = np.load(shared_folder("reference") / "house_price_seed1.npz")
    primary, harmful = load_house_prices(shared_folder("data") / "house_price")
    np.testing.assert_array_equal(primary.features.astype(np.float32), arrays["X_primary"].astype(np.float32))
    np.testing.assert_array_equal(harmful.features.astype(np.float32), arrays["X_harmful"].astype(np.float32))


def test_sources_that_cannot_be_read_are_refused(house_folder, tmp_path):
    for load in (load_house_prices, load_mnist):
        with pytest.raises(DataError, match="neither or both"):
            load()
        with pytest.raises(DataError, match="no such file"):
            load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="at least 500 rows"):
        load_house_prices(house_folder, rows=500)
    with pytest.raises(DataError, match="check the id"):
        load_house_prices(dataset=str(tmp_path / "missing.csv"))
    houses().drop(columns="MSZoning").to_csv(tmp_path / "odd.csv", index=False)
    with pytest.raises(DataError, match="MSZoning"):
        load_house_prices(dataset=str(tmp_path / "odd.csv"))
    houses().drop(columns="LotArea").to_csv(tmp_path / "odd2.csv", index=False)
    with pytest.raises(DataError, match="LotArea"):
        load_house_prices(dataset=str(tmp_path / "odd2.csv"))
    with pytest.raises(DataError, match="image and label"):
        load_mnist(dataset=str(house_folder / "all.csv"))


def leaning(shift, side=8):
    image = np.zeros((side, side))
    for row in range(side):
        image[row, int(np.clip(side / 2 + shift * (side / 2 - row), 0, side - 1))] = 1
    return image


def test_slant_labels_are_balanced_and_follow_the_slant():
    images = np.stack([leaning(s).ravel() for s in (-0.8, -0.4, 0.0, 0.3, 0.6, 0.9)])
    assert slant_labels(images).tolist() == [-1, -1, -1, 1, 1, 1]
    with pytest.raises(DataError, match="square"):
        slant_labels(np.ones((3, 7)))
    with pytest.raises(DataError, match="ink"):
        slant_labels(np.zeros((3, 4)))


@pytest.fixture
def digit_folder(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez(tmp_path / "mnist.npz", x_train=(digits.images * 15).astype(np.uint8), y_train=digits.target)
    return tmp_path


def test_mnist_file_and_dataset_agree(digit_folder, tmp_path):
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Picture

    pixels, labels = load_mnist(digit_folder)
    assert pixels.shape == (1797, 64) and 0.9 < pixels.max() <= 1
    with np.load(digit_folder / "mnist.npz") as arrays:
        pictures = [Picture.fromarray(image) for image in arrays["x_train"][:5]]
    features = Features({"image": Image(), "label": Value("int64")})
    table = Dataset.from_dict({"image": pictures, "label": labels[:5].tolist()}, features=features)
    table.to_parquet(str(tmp_path / "digits.parquet"))
    again, again_labels = load_mnist(dataset=str(tmp_path / "digits.parquet"))
    np.testing.assert_allclose(again, pixels[:5])
    assert again_labels.tolist() == labels[:5].tolist()


@pytest.mark.parametrize("dtype", [np.uint16, bool, np.float32])
def test_mnist_of_other_than_eight_bits_is_refused(tmp_path, dtype):
    """It was divided by 255 whatever it was: 1-bit ink came out as 0.004, 16 bits as up to 257."""
    np.savez(tmp_path / "mnist.npz", x_train=np.ones((3, 4, 4), dtype), y_train=np.arange(3))
    with pytest.raises(DataError, match=rf"images of 8 bits \(uint8\), got {np.dtype(dtype)}: convert them"):
        load_mnist(tmp_path)


def test_closed_form_reaches_the_limit_on_real_digits(digit_folder):
    pixels, labels = load_mnist(digit_folder)
    tasks = [
        LinearTask.of_features(pixels[labels == digit], slant_labels(pixels[labels == digit])) for digit in range(10)
    ]
    for one, other in ((0, 1), (3, 8), (9, 4), (5, 7)):
        immunizer = LinearImmunizer(tasks[one], tasks[other])
        report = immunizer.report(immunizer.closed_form().theta_DD)
        assert report.limit_fraction == pytest.approx(1, rel=1e-6)
        assert report.rank_aware.ratio == pytest.approx(immunizer.limit.whole_range_ratio, rel=1e-6)
        assert report.primary_loss == pytest.approx(report.primary_loss_before, rel=1e-6)


def test_closed_form_and_algorithm1_on_house_prices():
    primary, harmful = load_house_prices(shared_folder("data") / "house_price")
    immunizer = LinearImmunizer(
        primary.features, harmful.features, primary_labels=primary.labels, harmful_labels=harmful.labels
    )
    assert (immunizer.limit.common_rank, immunizer.primary.factor.rank, immunizer.harmful.factor.rank) == (70, 74, 74)
    best = immunizer.closed_form()
    report = immunizer.report(best.theta_DD)
    assert best.seconds < 1 and report.limit_fraction > 0.99
    assert report.primary_loss == pytest.approx(report.primary_loss_before, rel=1e-6)
    ours = immunizer.report(immunizer.algorithm1(strength=0.05, seed=0).theta_DD).rank_aware
    assert ours.ratio >= 356 and ours.primary_ratio < 1 < ours.harmful_ratio


@pytest.mark.slow
def test_closed_form_reaches_the_limit_on_all_mnist_pairs():
    pixels, labels = load_mnist(shared_folder("data"))
    tasks = [LinearTask.of_features(pixels[labels == digit]) for digit in range(10)]
    for one in range(10):
        for other in (d for d in range(10) if d != one):
            immunizer = LinearImmunizer(tasks[one], tasks[other])
            report = immunizer.report(immunizer.closed_form().theta_DD)
            assert report.limit_fraction > 0.99 and report.rank_aware.ratio > 0.99 * immunizer.limit.whole_range_ratio


def test_recipe_runs_from_its_command_line(house_folder, tmp_path, capsys):
    plan = tmp_path / "linear.yaml"
    plan.write_text(
        "task: house_prices\nrows: 8\nseeds: [0, 1]\nmethods:\n"
        "- {method: closed_form}\n- {method: algorithm1, epochs: 2}\n"
    )
    done = RECIPE["main"]([str(plan), "--data_dir", str(house_folder), "--output_dir", str(tmp_path / "out")])
    assert done == 0 and "| algorithm1 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(written["rows"]) == 3 and written["limits"]["house_prices"]["common_rank"] >= 1
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == 3
    assert RECIPE["main"]([str(plan), "--data_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path)]) == 2
    assert "error: expected House Prices" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["linear-house-prices", "linear-mnist-pairs"])
def test_recipes_parse_and_name_known_methods(recipe):
    plan = RECIPE["load_plan"](ROOT / "recipes" / recipe / "linear.yaml")
    assert {entry["method"] for entry in plan["methods"]} == {*METHODS, "closed_form"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("task: house_prices\nmethod: [1]\n", "expected keys"), ("task: cars\nmethods: [1]\n", "task to be one of"),
     ("task: house_prices\n", "at least one method")],
    ids=["unknown key", "unknown task", "no methods"],
)  # fmt: skip
def test_plans_that_make_no_sense_are_refused(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        RECIPE["load_plan"](tmp_path / "plan.yaml")
