"""Artefacts and loading: what goes where, what is refused, and that rows go by the values of ids."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from mtl_jax.balancing import equal
from mtl_jax.data.batching import as_batch
from mtl_jax.data.dataset import Encoded
from mtl_jax.data.schema import Categorical, Numeric, Schema, Vocabulary
from mtl_jax.errors import ConfigError, MissingFile, RunFolderError
from mtl_jax.model import MultiTaskModel
from mtl_jax.nn import Encoder, Tower
from mtl_jax.sharing import ResFlow, SharedBottom
from mtl_jax.tasks import Task
from mtl_jax.train import Optimizer, Step
from mtl_jax.train.state import Functional
from mtl_jax.transfer import Artefact, load

CITIES = ("rome", "oslo", "lima", "bonn", "kobe")
SCHEMA = Schema(
    (Categorical("city", "city"), Numeric("price")),
    (Vocabulary("city", CITIES),),
    (Task("click", "binary"), Task("buy", "binary")),
)


def with_cities(*names, **fields):
    return dataclasses.replace(SCHEMA, vocabularies=(Vocabulary("city", names),), **fields)


def model_of(schema=SCHEMA, seed=0, units=(5, 4), sharing=SharedBottom, **options):
    return MultiTaskModel(
        schema,
        encoder=functools.partial(Encoder, embedding_dim=3, stddev=0.5),
        sharing=functools.partial(sharing, units=units, dropout=0.0, **options),
        towers=functools.partial(Tower, units=(4,), dropout=0.0),
        rngs=nnx.Rngs(seed),
    )


def arrays(model):
    return {path: np.asarray(array) for path, array in Functional.of(model)[1].items()}


def rows_of(schema, cities):
    """Rows with these cities, as numbers of the schema."""
    place = {name: index + 2 for index, name in enumerate(schema.vocabularies[0].values)}
    ids = np.array([[place.get(city, 1)] for city in cities], np.int32)
    dense = np.linspace(-1, 1, len(ids), dtype=np.float32)[:, None].repeat(len(schema.dense_names), axis=1)
    names = schema.task_names
    labels = {name: np.arange(len(ids)).astype(np.float32) % 2 for name in names}
    mask, ones = dict.fromkeys(names, np.ones(len(ids), bool)), np.ones(len(ids), np.float32)
    return as_batch(Encoded(ids, dense, {}, {}, labels, mask, {}, ones))


TRAINED = model_of(seed=1)
SOURCE = Artefact.of(TRAINED, SCHEMA, auc=0.8)


def test_all_of_it_is_the_source():
    loading = load(model_of(seed=2), SCHEMA, SOURCE)
    for path, array in arrays(TRAINED).items():
        np.testing.assert_array_equal(arrays(loading.model)[path], array)
    assert loading.loaded == {path: path for path in arrays(TRAINED)}
    assert loading.coverage == {"tables/city/rows": (5, 0, 0)}
    assert not (loading.reinitialised or loading.dropped or loading.rescaled)
    batch = rows_of(SCHEMA, CITIES)
    for task, outputs in TRAINED(batch).items():
        np.testing.assert_array_equal(loading.model(batch)[task], outputs)


def test_the_target_is_left_as_it_was():
    model = model_of(seed=2)
    before = arrays(model)
    load(model, SCHEMA, SOURCE)
    jax.tree.map(np.testing.assert_array_equal, arrays(model), before)


def test_rows_go_by_the_values_of_ids():
    """In another order, with two ids that the source lacks; predictions of the shared ones stay."""
    schema = with_cities("kobe", "york", "rome", "pune", "lima")
    loading = load(model_of(schema, seed=2), schema, SOURCE)
    assert loading.coverage == {"tables/city/rows": (3, 2, 2)}
    shared = ("lima", "kobe", "rome", "nowhere")
    for task, outputs in TRAINED(rows_of(SCHEMA, shared)).items():
        np.testing.assert_array_equal(loading.model(rows_of(schema, shared))[task], outputs)


@pytest.mark.parametrize("new_rows", ["fresh", "mean", "unk"])
def test_rows_of_new_ids(new_rows):
    schema = with_cities("york", "rome")
    model, source = model_of(schema, seed=2), arrays(TRAINED)["tables/city/rows"]
    rows = arrays(load(model, schema, SOURCE, new_rows=new_rows).model)["tables/city/rows"]
    expected = {"fresh": arrays(model)["tables/city/rows"][2], "mean": source[2:].mean(axis=0), "unk": source[1]}
    np.testing.assert_allclose(rows[2], expected[new_rows], rtol=1e-6)
    np.testing.assert_array_equal(rows[[0, 1, 3]], source[[0, 1, 2]])


def test_tasks_go_where_their_labels_mean_the_same():
    """``buy`` is another kind and ``return`` is new: both start as they would without a source."""
    tasks = (Task("click", "binary"), Task("buy", "regression"), Task("return", "binary"))
    schema = dataclasses.replace(SCHEMA, tasks=tasks)
    model = model_of(schema, seed=2)
    loading = load(model, schema, SOURCE)
    assert {path.split("/")[1] for path in loading.reinitialised} == {"buy", "return"}
    assert {path.split("/")[1] for path in loading.dropped} == {"buy"}
    for path, array in arrays(loading.model).items():
        origin = arrays(model) if path in loading.reinitialised else arrays(TRAINED)
        np.testing.assert_array_equal(array, origin[path])


def test_a_map_renames():
    schema = dataclasses.replace(SCHEMA, tasks=(Task("view", "binary"), Task("order", "binary")))
    rules = [(r"task/click/(.*)", r"task/view/\1"), (r"(tables|sharing)/(.*)", r"\1/\2")]
    loading = load(model_of(schema), schema, SOURCE, map=rules, drop=["task/buy/.*"], reinit=["task/order/.*"])
    found = arrays(loading.model)
    for path, array in arrays(TRAINED).items():
        if not path.startswith("task/buy"):
            np.testing.assert_array_equal(found[path.replace("task/click", "task/view")], array)
    assert loading.loaded["task/view/tower/head/bias"] == "task/click/tower/head/bias"


@pytest.mark.parametrize(
    ("model", "schema", "options", "messages"),
    [
        (model_of(units=(5, 4, 4)), SCHEMA, {}, [r"2 arrays of the target have no source: sharing/\S+/layers/2/"]),
        (model_of(units=(5,)), SCHEMA, {}, [r"2 arrays of the source have no place: sharing/\S+/layers/1/\S+ \[4\]"]),
        (model_of(units=(6, 4)), SCHEMA, {}, [r"the source has float32\[4, 5\], the target float32\[4, 6\]"]),
        (model_of(), SCHEMA, {"drop": ["nothing"]}, ["drop has 'nothing', which fits no array"]),
        (model_of(), SCHEMA, {"reinit": ["sharing/.*"]}, ["arrays of the source have no place: sharing/"]),
        (model_of(), SCHEMA, {"new_rows": "zero"}, [r"new_rows is 'zero'; expected one of \['fresh'"]),
        (
            model_of(),
            SCHEMA,
            {"map": [("tower", "x"), (r"task/\w+/(.*)", r"task/buy/\1"), (r"[st].*", r"\g<0>")]},
            [
                "both go to task/buy/tower/",
                "map has 'tower', which fits no array",
                "arrays of the target have no source: task/",
            ],
        ),
        (
            model_of(with_cities("rome", "rome")),
            with_cities("rome", "rome"),
            {},
            ["vocabulary 'city' has a value twice"],
        ),
    ],
    ids=["deeper", "shallower", "wider", "drop", "reinit", "new rows", "map", "twice"],
)
def test_what_does_not_fit_is_named(model, schema, options, messages):
    for message in messages:
        with pytest.raises(ConfigError, match=message):
            load(model, schema, SOURCE, **options)


def test_layers_are_not_loaded_over_other_features():
    features = (Categorical("city", "city"), Numeric("weight"))
    schema = dataclasses.replace(SCHEMA, features=features)
    with pytest.raises(ConfigError, match=r"shared layers read the numbers \['price'.*\] in the source and \['weight'"):
        load(model_of(schema), schema, SOURCE)
    tables = {"map": [(r"tables/.*", r"\g<0>")], "drop": ["sharing/.*", "task/.*"], "reinit": ["sharing/.*", "task/.*"]}
    assert load(model_of(schema), schema, SOURCE, **tables).loaded == {"tables/city/rows": "tables/city/rows"}


def test_hashed_ids_need_as_many_buckets():
    def hashed(buckets):
        return dataclasses.replace(SCHEMA, vocabularies=(Vocabulary("city", hash_buckets=buckets),))

    source = Artefact.of(model_of(hashed(8)), hashed(8))
    assert load(model_of(hashed(8), seed=2), hashed(8), source).coverage["tables/city/rows"].known == 8
    for other in (hashed(9), SCHEMA):
        with pytest.raises(ConfigError, match="ids of the source have 8 hash buckets"):
            load(model_of(other), other, source)


def test_other_scales_are_reported():
    schema = dataclasses.replace(SCHEMA, features=(SCHEMA.features[0], Numeric("price", mean=3.0)))
    assert load(model_of(schema), schema, SOURCE).rescaled == ("price",)


def test_states_go_along():
    """Running moments are a part of what was trained."""
    source = model_of(sharing=ResFlow, logits=False)
    functional, params, rest = Functional.of(source)
    rest = {path: array + 1 for path, array in rest.items()}
    loading = load(
        model_of(sharing=ResFlow, logits=False, seed=2), SCHEMA, Artefact.of(functional.merge(params, rest), SCHEMA)
    )
    assert functional.state_paths
    for path in functional.state_paths:
        np.testing.assert_array_equal(Functional.of(loading.model)[2][path], rest[path])


def test_training_goes_on_from_it_with_a_new_optimizer():
    loading = load(model_of(seed=2), SCHEMA, SOURCE)
    step, state = Step.of(loading.model, SCHEMA.tasks, key=jax.random.key(0), optimizer=Optimizer(), balancer=equal())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt))
    after, _ = jax.jit(step)(state, rows_of(SCHEMA, CITIES))
    assert np.any(after.params["sharing/bottom/layers/0/kernel"] != state.params["sharing/bottom/layers/0/kernel"])


def test_it_is_saved_and_read_whole(tmp_path):
    SOURCE.save(tmp_path / "source")
    found = Artefact.read(tmp_path / "source")
    assert found.hash == SOURCE.hash and found.schema == SCHEMA and found.facts == {"auc": 0.8}
    jax.tree.map(np.testing.assert_array_equal, dict(found.arrays), dict(SOURCE.arrays))
    manifest = json.loads((tmp_path / "source" / "manifest.json").read_text())
    assert manifest["arrays"]["task/buy/tower/head/bias"]["shape"] == [1]
    with pytest.raises(RunFolderError, match="has an artefact already"):
        SOURCE.save(tmp_path / "source")


def test_damage_is_found(tmp_path):
    with pytest.raises(MissingFile, match="expected the folder of an artefact"):
        Artefact.read(tmp_path)
    SOURCE.save(tmp_path)
    whole = (tmp_path / "arrays.npz").read_bytes()
    (tmp_path / "arrays.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunFolderError, match="cannot be read"):
        Artefact.read(tmp_path)
    others = {path: array + 1 for path, array in SOURCE.arrays.items()}
    np.savez(tmp_path / "arrays.npz", **others)
    with pytest.raises(RunFolderError, match="the arrays are not those of its manifest"):
        Artefact.read(tmp_path)
