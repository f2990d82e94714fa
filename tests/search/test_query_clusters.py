"""Clusters of queries: k-means against a definition, and labels that depend on the data alone."""

import json

import numpy as np
import pytest
import stub

from raybge.cli.console import Console
from raybge.cluster.resources import Plan
from raybge.data.groups import parse_group
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.search import query_clusters
from raybge.search.kmeans import nearest_centroids, train_centroids
from raybge.search.query_clusters import QueryVectors, cluster_queries, query_parts, sample_size, sampled_parts
from raybge.util.errors import UserError

ROWS = 90


def blobs(clusters: int, each: int, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors near random directions, of different lengths, and the number of each one's direction."""
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(clusters), each))
    vectors = random.standard_normal((clusters, dim))[labels] + 0.05 * random.standard_normal((len(labels), dim))
    return (vectors * random.uniform(0.1, 10, (len(labels), 1))).astype(np.float32), labels


def test_separate_directions_are_found():
    vectors, expected = blobs(5, 40)
    centroids = train_centroids(vectors, 5, seed=1)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    labels = nearest_centroids(vectors, centroids)
    assert len({*zip(labels.tolist(), expected.tolist(), strict=True)}) == 5
    for number, centroid in enumerate(centroids):  # the mean direction of its vectors
        members = vectors[labels == number]
        mean = (members / np.linalg.norm(members, axis=1, keepdims=True)).mean(0)
        np.testing.assert_allclose(centroid, mean / np.linalg.norm(mean), atol=1e-4)


def test_centroids_are_a_greedy_chain_and_depend_on_the_seed_alone():
    vectors = np.random.default_rng(1).standard_normal((300, 8)).astype(np.float32)
    centroids = train_centroids(vectors, 12, seed=2**40)
    assert (train_centroids(vectors, 12, seed=2**40) == centroids).all()
    assert (train_centroids(vectors, 12, seed=3) != centroids).any()
    cosines = centroids @ centroids.T
    for number in range(11):
        assert cosines[number, number + 1] == cosines[number, number + 1 :].max()


def test_equal_vectors_and_as_many_clusters_as_vectors():
    assert train_centroids(np.ones((4, 3), np.float32), 4, seed=0).shape == (4, 3)
    assert np.isfinite(train_centroids(np.zeros((4, 3), np.float32), 2, seed=0)).all()


@pytest.mark.parametrize(
    ("rows", "clusters", "dim", "expected"),
    [(1000, 2, 32, 128), (100, 2, 32, 100), (10**8, 2048, 1024, 65_536), (10**8, 16_384, 8192, 16_384)],
)
def test_the_sample_is_bounded(rows, clusters, dim, expected):
    assert sample_size(rows, clusters, dim) == expected


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Two files of groups, in small blocks and parts; the third row of each file is invalid."""
    monkeypatch.setattr(query_clusters, "PART_ROWS", 10)
    monkeypatch.setattr(query_clusters, "SAMPLED_ROWS", 4)
    for name in ("a", "b"):
        rows = [{"query": f"{name} {i}", "pos": ["p"], "prompt": f"{i % 3}"} for i in range(ROWS // 2)]
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join([*lines[:2], '{"query": 1}\n', *lines[2:]]))
    files = list_files([str(tmp_path / "*.jsonl")], "--train_data")
    return survey(files, 200, parse_group, on_bad_rows="skip")


def test_parts_have_each_row_once_and_a_sample_its_rows(groups):
    parts = query_parts(groups, parse_group, None)
    rows = {row: query for part in parts for row, query in rows_of(part)}
    assert list(rows.values()) == [f"{name} {i}" for name in ("a", "b") for i in range(ROWS // 2)]
    assert list(rows) == list(range(ROWS))
    assert max(part.rows for part in parts) < 20 and len(parts) > 4
    sample = [row for part in sampled_parts(parts, 7, seed=0) for row in rows_of(part)]
    assert len(sample) == 7 == len(set(sample)) and set(sample) <= set(rows.items())
    assert sample != [row for part in sampled_parts(parts, 7, seed=1) for row in rows_of(part)]
    assert len(sampled_parts(parts, ROWS, seed=0)) == len(parts)


def rows_of(part):
    (table,) = part()
    return list(zip(table["row"].to_pylist(), table["query"].to_pylist(), strict=True))


def test_a_changed_file_is_named(groups, tmp_path):
    parts = query_parts(groups, parse_group, None)
    (tmp_path / "a.jsonl").write_text('{"query": "q", "pos": ["p"]}\n' + "\n" * 5000)
    with pytest.raises(UserError, match=r"a\.jsonl changed during the run"):
        parts[0]()


def labels_of(groups, vectors, actors=1, clusters=6):
    labels = np.full(ROWS, 999, np.uint16)
    cluster_queries(groups, parse_group, vectors, clusters, 5, Plan(actors, 1, 0), labels, Console(True, True, False))
    return labels


def test_labels_are_the_same_for_any_number_of_actors(groups, tmp_path, ray_cluster):
    vectors = QueryVectors(stub.DIM, stub.embedder())
    results = [labels_of(groups, vectors, actors) for actors in (1, 2, 3)]
    assert all((each == results[0]).all() for each in results)
    # saved vectors of the same queries, and another definition: the most similar mean direction
    texts = [f"{name} {i}" for name in ("a", "b") for i in range(ROWS // 2)]
    encoded = stub.StubEncoder(None, 0, stub.DIM, "").encode_queries(texts)
    np.save(tmp_path / "v.npy", encoded)
    saved = labels_of(groups, QueryVectors(stub.DIM, path=str(tmp_path / "v.npy")), 2)
    assert 3 < len(set(saved.tolist())) <= 6
    assert saved.max() < 6


def test_labels_are_the_same_without_ray(groups, tmp_path, monkeypatch, ray_cluster):
    encoded = np.random.default_rng(0).standard_normal((ROWS, 8)).astype(np.float32)
    np.save(tmp_path / "v.npy", encoded)
    vectors = QueryVectors(8, path=str(tmp_path / "v.npy"))
    on_ray = labels_of(groups, vectors, 3)
    monkeypatch.setattr(query_clusters, "ray_is_connected", lambda: False)
    assert (labels_of(groups, vectors) == on_ray).all()
    centroids = query_clusters._centroids(
        sampled_parts(query_parts(groups, parse_group, vectors.path), 24, 5), vectors, 6, 5, Plan(1, 1, 0)
    )
    unit = encoded / np.linalg.norm(encoded, axis=1, keepdims=True)
    assert (on_ray == (unit @ centroids.T).argmax(1)).all()
