"""Arms of an ablation: combinations and their names, named ones, the baseline, and what is refused."""

import pytest

from mtl_jax.arms import SCRATCH, SINGLE_TASK, arms_of
from mtl_jax.errors import ConfigError

SHARING = {"sharing": ["mmoe", "shared_bottom"]}


def names(*arguments, **options):
    return [arm.name for arm in arms_of(*arguments, **options)]


def methods(*arguments, **options):
    return [arm for arm in arms_of(*arguments, **options) if arm.name != SINGLE_TASK]


def test_every_combination_is_an_arm_in_the_order_of_the_lists():
    found = names(SHARING | {"balancing": ["equal", "pcgrad"]})
    assert found == ["single_task", "mmoe+equal", "mmoe+pcgrad", "shared_bottom+equal", "shared_bottom+pcgrad"]
    assert names(SHARING, baseline=None) == ["mmoe", "shared_bottom"]
    assert names({}) == ["single_task", ""], "nothing varies: the choices themselves are the name"


def test_an_arm_is_composed_of_what_is_fixed_and_its_own_choices():
    (_, mmoe, _) = arms_of(SHARING, fixed=["data=synthetic", "towers.units=[4]"])
    assert mmoe.overrides == ("data=synthetic", "towers.units=[4]", "sharing=mmoe")


@pytest.mark.parametrize(
    ("key", "value", "label"),
    [
        ("sharing.num_experts", "4", "num_experts=4"),
        ("sharing.share_embeddings", "true", "share_embeddings=true"),
        ("balancing.scope", "shared", "scope=shared"),
        ("optimizer", "sgd", "sgd"),
        ("trainer.precision", "bfloat16", "precision=bfloat16"),
        ("training", "staged", "staged"),
    ],
)
def test_a_node_is_called_by_its_name_and_a_value_with_its_key(key, value, label):
    assert methods(SHARING | {key: [value]})[0].name == f"mmoe+{label}"
    assert methods(SHARING | {key: [value]})[0].overrides[-2:] in (
        ("sharing=mmoe", f"{key}={value}"),
        (f"{key}={value}", "sharing=mmoe"),
    )


def test_the_baseline_is_single_task_under_equal_weights_without_the_options_of_other_methods():
    """sharing.num_experts=4 would not even compose with it; what concerns data and training is kept."""
    fixed = [
        "sharing.num_experts=4", "+sharing.extra=1", "~balancing.scope", "balancing=pcgrad", "link@l=none",
        "transfer=l2_sp", "alignment.rate=1", "trainer.epochs=2", "towers.units=[4]", "++axis.balancing.c=[1]",
    ]  # fmt: skip
    baseline = arms_of(SHARING, fixed=fixed)[0]
    kept = ("trainer.epochs=2", "towers.units=[4]", "++axis.balancing.c=[1]")
    assert baseline == (SINGLE_TASK, (*kept, "sharing=single_task", "balancing=equal"))


def test_there_is_one_baseline_a_data_set_with_the_first_of_other_choices():
    sweeps = SHARING | {"data": ["movielens_1m", "complete_journey"], "optimizer": ["adam", "sgd"]}
    arms = arms_of(sweeps)
    baselines = [arm.overrides for arm in arms if arm.name == SINGLE_TASK]
    rest = ("optimizer=adam", "sharing=single_task", "balancing=equal")
    assert baselines == [("data=movielens_1m", *rest), ("data=complete_journey", *rest)]
    each = ["mmoe+adam", "shared_bottom+adam", "mmoe+sgd", "shared_bottom+sgd"]
    assert [arm.name for arm in arms] == 2 * [SINGLE_TASK, *each], "data sets are no part of a name"


def test_single_task_in_the_list_is_the_baseline():
    sweeps = {"sharing": ["single_task", "mmoe"], "balancing": ["equal", "pcgrad"]}
    assert names(sweeps) == ["single_task", "mmoe+equal", "mmoe+pcgrad"]
    assert names(sweeps, baseline=None)[:2] == ["single_task+equal", "single_task+pcgrad"]


def test_named_arms_stand_alone_or_beside_combinations():
    wide = {"name": "wide", "overrides": ["sharing=mmoe", "sharing.num_experts=16"]}
    assert names({}, named=[wide]) == ["single_task", "wide"]
    assert names(SHARING, named=[wide]) == ["single_task", "mmoe", "shared_bottom", "wide"]
    assert names({"optimizer": ["adam", "sgd"]}, named=[wide]) == ["single_task", "wide+adam", "wide+sgd"]
    arm = arms_of({}, fixed=["sharing.num_experts=2"], named=[wide])[-1]
    assert arm.overrides == ("sharing.num_experts=2", "sharing=mmoe", "sharing.num_experts=16"), "its own come last"


@pytest.mark.parametrize(
    "entry",
    ["wide", {"name": "wide"}, {"name": "wide", "overrides": "sharing=mmoe"}, {"name": "a", "overrides": [], "x": 1}],
)
def test_a_malformed_arm_is_refused(entry):
    with pytest.raises(ConfigError, match="arms has .*; expected entries with name and overrides"):
        arms_of({}, named=[entry])


def test_arms_that_are_no_list_are_refused():
    with pytest.raises(ConfigError, match="arms is {'wide': 1}; expected a list of entries"):
        arms_of({}, named={"wide": 1})


@pytest.mark.parametrize("name", ["", "  ", None, ["a"]])
def test_an_arm_needs_a_name(name):
    with pytest.raises(ConfigError, match="expected entries with name and overrides"):
        arms_of({}, named=[{"name": name, "overrides": []}])


def test_names_that_clash_are_refused():
    arm = {"name": "mmoe", "overrides": ["sharing=mmoe"]}
    for sweeps, named in [(SHARING, [arm]), ({}, [arm, arm]), ({"sharing": ["mmoe", "mmoe"]}, None)]:
        with pytest.raises(ConfigError, match="two arms are called 'mmoe'"):
            arms_of(sweeps, named=named)
    with pytest.raises(ConfigError, match="two arms are called 'single_task'"):
        arms_of({}, named=[arm | {"name": "single_task"}])
    assert names({"data": ["a", "b"]}, named=[arm]) == 2 * ["single_task", "mmoe"], "on two data sets they do not clash"


def test_another_baseline_is_refused():
    with pytest.raises(ConfigError, match=r"baseline is 'mmoe'; expected one of \['single_task', 'scratch', 'none'\]"):
        arms_of(SHARING, baseline="mmoe")


def test_scratch_is_the_same_method_without_transfer():
    """What the transfers have in common is kept, with the first of other choices; only their own options go."""
    fixed = [
        "sharing.num_experts=4", "balancing=pcgrad", "transfer=l2_sp", "transfer.alpha=1", "+alignment.rate=1",
        "source=north", "target=west", "loading.new_rows=mean", "trainer.epochs=2",
    ]  # fmt: skip
    sweeps = {"transfer": ["fine_tune", "lora"], "sharing": ["mmoe", "ple"], "optimizer": ["adam", "sgd"]}
    (baseline, first, *_) = arms_of(sweeps, fixed=fixed, baseline=SCRATCH)
    kept = ("sharing.num_experts=4", "balancing=pcgrad", "source=north", "target=west", "loading.new_rows=mean")
    assert baseline == (
        SCRATCH,
        (*kept, "trainer.epochs=2", "optimizer=adam", "sharing=mmoe", "transfer=scratch"),
    )
    assert (first.name, first.overrides[: len(fixed)]) == ("fine_tune+mmoe+adam", tuple(fixed))


def test_scratch_in_the_list_is_the_baseline():
    sweeps = {"transfer": ["scratch", "fine_tune"]}
    assert names(sweeps, baseline=SCRATCH) == ["scratch", "fine_tune"]
    assert names(sweeps, baseline=None) == ["scratch", "fine_tune"]
    assert names(sweeps, baseline=SINGLE_TASK) == ["single_task", "scratch", "fine_tune"]
    assert names(sweeps | {"balancing": ["equal", "pcgrad"]}, baseline=SCRATCH) == [
        "scratch", "fine_tune+equal", "fine_tune+pcgrad",
    ]  # fmt: skip


def test_there_is_one_scratch_a_data_set():
    sweeps = {"transfer": ["fine_tune"], "data": ["movielens_1m", "complete_journey"]}
    found = arms_of(sweeps, fixed=["source=a", "target=b"], baseline=SCRATCH)
    assert [arm.name for arm in found] == 2 * ["scratch", "fine_tune"]
    assert [arm.overrides[2:] for arm in found if arm.name == SCRATCH] == [
        ("data=movielens_1m", "transfer=scratch"),
        ("data=complete_journey", "transfer=scratch"),
    ]


def test_options_of_a_transfer_are_none_of_scratch():
    (baseline, *arms) = arms_of({"transfer.alpha": ["0.1", "1"]}, fixed=["transfer=l2_sp"], baseline=SCRATCH)
    assert baseline == (SCRATCH, ("transfer=scratch",))
    assert [arm.name for arm in arms] == ["alpha=0.1", "alpha=1"]


def test_single_task_training_under_scratch_is_an_arm_like_others():
    assert names({"sharing": ["single_task", "mmoe"], "transfer": ["lora"]}, baseline=SCRATCH) == [
        "scratch", "single_task+lora", "mmoe+lora",
    ]  # fmt: skip


def test_named_transfers_stand_beside_scratch():
    weak = {"name": "weak", "overrides": ["transfer=l2_sp", "transfer.alpha=0.01"]}
    baseline, arm = arms_of({}, fixed=["source=a", "target=b"], named=[weak], baseline=SCRATCH)
    assert baseline == (SCRATCH, ("source=a", "target=b", "transfer=scratch"))
    assert arm == ("weak", ("source=a", "target=b", "transfer=l2_sp", "transfer.alpha=0.01"))
    with pytest.raises(ConfigError, match="two arms are called 'scratch'"):
        arms_of({}, named=[weak | {"name": "scratch"}], baseline=SCRATCH)
