"""What a run keeps beside maps: predictions with their channels, embeddings, class weights."""

import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cleanlab.filter import find_label_issues
from sklearn.neighbors import NearestNeighbors

from scacam.errors import RunError
from scacam.explainer import observe
from scacam.images import decode, pixels, view_of
from scacam.jobs import explain
from scacam.networks import load_network
from scacam.runs import exports
from scacam.runs.proof import prove
from scacam.runs.results import open_run
from scacam.storage.parquet import write_table
from scacam.tables import PREDICTION

NETWORK = "tests.tiny_networks:colours"
COUNT = 14


@pytest.fixture(scope="module")
def out(tmp_path_factory, module_photo) -> Path:
    """A run of some labelled photos, one of which is none."""
    folder = tmp_path_factory.mktemp("predictions")
    lines = ["uri,label"]
    for seed in range(COUNT):
        path = folder / f"{seed}.png"
        module_photo(100, 80, seed).save(path)
        lines.append(f"{path},{seed % 4 if seed else ''}")
    (folder / "broken.png").write_bytes(b"none")
    (folder / "photos.csv").write_text("\n".join([*lines, f"{folder}/broken.png,1"]))
    explain.run(
        input=str(folder / "photos.csv"),
        output=str(folder / "out"),
        networks=[NETWORK],
        methods=["grad_cam"],
        top_k=2,
        explain_label=True,
        embeddings=True,
    )
    return folder / "out"


def rows(out: Path, kind: str) -> list[dict]:
    return pq.ParquetDataset(out / kind / f"network={NETWORK}").read().to_pylist()


def test_each_explained_class_has_a_prediction(out):
    explained = {
        (row["image_id"], row["class_id"], row["rank"], row["probability"], row["label"])
        for row in pq.ParquetDataset(out / "explanations").read().to_pylist()
    }
    found = rows(out, "predictions")
    assert len(found) == len(explained) > 2 * COUNT
    keys = ("image_id", "class_id", "rank", "probability", "label")
    assert {tuple(row[key] for key in keys) for row in found} == explained
    schema = pq.read_schema(next((out / "predictions").rglob("*.parquet")))
    assert schema.names == ["image_id", "uri", "label", *PREDICTION.names]
    for field in PREDICTION:
        kind = schema.field(field.name).type
        assert kind == field.type or pa.types.is_list(kind)


def test_predictions_say_what_the_network_says(out):
    """Logits, contributions and cells, one image at a time."""
    network = load_network(NETWORK)
    for row in rows(out, "predictions"):
        photo = decode(Path(row["uri"]).read_bytes())
        view = view_of(*photo.size, network.preprocessing, "center_crop")
        sample = torch.from_numpy(pixels(photo, view, network.preprocessing).copy()[None])
        seen = observe(network, network.normalize(sample), 4)
        assert row["logit"] == pytest.approx(float(seen.logits[0, row["class_id"]]), abs=1e-4)
        if row["rank"] == 2:
            continue
        features = seen.features[0]
        weights = network.class_weights[row["class_id"]]
        expected = (weights * features.mean((1, 2))).numpy()
        order = np.argsort(-expected, kind="stable")
        assert sorted(row["channel_ids"]) == [0, 1, 2, 3]
        np.testing.assert_allclose(
            row["channel_contributions"], expected[row["channel_ids"]], rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(row["channel_contributions"], expected[order], atol=2e-3)
        for channel, cell in zip(row["channel_ids"], row["channel_cells"], strict=True):
            most = features[channel].max()
            assert float(features[channel].flatten()[cell]) == pytest.approx(float(most), abs=1e-4)


def test_channels_are_those_of_the_top_class_and_of_the_label(out):
    for row in rows(out, "predictions"):
        named = row["rank"] == 1 or row["rank"] is None
        assert (row["channel_ids"] is not None) == named
        assert len({row[name] is None for name in PREDICTION.names[-3:]}) == 1


def test_embeddings_and_class_weights_give_the_logits(out):
    vectors = {row["image_id"]: np.array(row["embedding"]) for row in rows(out, "embeddings")}
    assert sorted(vectors) == list(range(COUNT))
    classes = pq.read_table(out / f"networks/{NETWORK}.parquet").to_pylist()
    assert [row["class_name"] for row in classes] == ["red", "green", "blue", "gray"]
    for row in rows(out, "predictions"):
        one = classes[row["class_id"]]
        logit = np.dot(one["weights"], vectors[row["image_id"]]) + one["bias"]
        assert row["logit"] == pytest.approx(logit, abs=5e-3)


def test_other_readers_read_them(out):
    sql = duckdb.connect()
    found = sql.execute(
        "select network, count(*), max(len(channel_ids)) "
        f"from read_parquet('{out}/predictions/*/*.parquet', hive_partitioning = true) group by all"
    ).fetchall()
    assert found == [(NETWORK, len(rows(out, "predictions")), 4)]


def test_the_index_knows_them(out):
    index = pq.read_table(out / "index.parquet").to_pandas()
    for kind in ("predictions", "embeddings"):
        shards = index[index["path"].str.startswith(kind)]
        assert shards["images"].sum() == COUNT
        assert (shards["network"] == NETWORK).all()
        assert shards["layer"].isna().all()


def test_arrays_for_other_tools(out):
    run = open_run(str(out))
    ids, vectors = exports.embeddings(run, NETWORK)
    assert vectors.dtype == np.float16
    assert dict(zip(ids.tolist(), vectors.tolist(), strict=True)) == {
        row["image_id"]: list(row["embedding"]) for row in rows(out, "embeddings")
    }
    same, said = exports.probabilities(run, NETWORK)
    assert same.tolist() == ids.tolist() == sorted(ids.tolist())
    assert said.shape == (COUNT, run.networks[NETWORK]["num_classes"])
    assert said.nnz == len(rows(out, "predictions"))
    for row in rows(out, "predictions"):
        place = np.searchsorted(ids, row["image_id"]), row["class_id"]
        assert said[place] == np.float32(row["probability"])
    with pytest.raises(RunError, match="no network 'vgg'"):
        exports.probabilities(run, "vgg")


def test_other_tools_take_them(out):
    """A label that cannot be right is an issue; nearest neighbours find an image first itself."""
    run = open_run(str(out))
    _, said = exports.probabilities(run, NETWORK)
    dense = said.toarray()
    labels = dense.argmax(1)
    labels[3] = dense[3].argmin()
    issues = find_label_issues(labels, dense, filter_by="predicted_neq_given")
    assert issues.nonzero()[0].tolist() == [3]
    vectors = exports.embeddings(run, NETWORK)[1].astype(np.float32)
    nearest = NearestNeighbors(n_neighbors=1).fit(vectors).kneighbors(vectors)[0]
    np.testing.assert_allclose(nearest, 0, atol=1e-3)


def test_samples_for_fiftyone(out):
    fiftyone = pytest.importorskip(
        "fiftyone", reason="FiftyOne needs another graphql-core than the packages of the tests"
    )
    found = list(exports.samples(open_run(str(out)), NETWORK, "grad_cam"))
    assert len(found) == COUNT
    assert all(isinstance(sample, fiftyone.Sample) for sample in found)
    assert found[0].heatmap.map.shape == (80, 100)
    assert len(found[0].embedding) == len(rows(out, "embeddings")[0]["embedding"])


@pytest.mark.parametrize("kind", ["predictions", "embeddings"])
@pytest.mark.parametrize("wrong", ["missing", "twice", "row twice"])
def test_a_run_that_lacks_them_is_not_whole(out, tmp_path, kind, wrong):
    record = json.loads((out / "run.json").read_text())
    arguments = record["networks"], COUNT + 1, True
    prove(str(out), *arguments)
    shard = next((out / kind).rglob("*.parquet"))
    whole = shard.read_bytes()
    other = shard.with_name("other.parquet")
    try:
        if wrong == "missing":
            shard.unlink()
        elif wrong == "twice":
            other.write_bytes(whole)
        else:
            table = pq.ParquetFile(shard).read()
            write_table(str(shard), pa.concat_tables([table, table.slice(0, 1)]))
        with pytest.raises(RunError, match=r"twice|not whole"):
            prove(str(out), *arguments)
    finally:
        shard.write_bytes(whole)
        other.unlink(missing_ok=True)


def test_embeddings_are_on_request(out):
    with pytest.raises(RunError, match="embeddings: True → False"):
        explain.run(
            input=str(out.parent / "photos.csv"),
            output=str(out),
            networks=[NETWORK],
            methods=["grad_cam"],
            top_k=2,
            explain_label=True,
        )


def test_a_network_without_class_weights_has_null_ones(tmp_path):
    from scacam.networks import Network
    from scacam.runs.describe import class_weights

    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 4, stride=4),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(5, 6),
        torch.nn.GELU(),
        torch.nn.Linear(6, 3),
    )
    path, table = class_weights(str(tmp_path), Network(module, name="mlp"))
    assert path.endswith("networks/mlp.parquet")
    assert table["weights"].null_count == table["bias"].null_count == len(table) == 3
