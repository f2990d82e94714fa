"""Spherical k-means: unit centroids, and the most similar one of each vector.

Letters in array names: N vectors, C clusters, D width of a vector.
"""

from __future__ import annotations

import numpy as np

ITERATIONS = 10
MAX_CLUSTERS = 16_384  # a label has two bytes, and the chain of the centroids takes C² products


def train_centroids(vectors_ND: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Cluster a sample of vectors by their cosine.

    Args:
        vectors_ND: the sample, at least as many as clusters.
        clusters: number of clusters.
        seed: seed of the first centroids.

    Returns:
        The centroids (C, D) float32, each next to one that is similar.
    """
    import faiss

    vectors_ND = unit_vectors(vectors_ND)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # sums of several threads differ in their last bits from those of one
    # faiss would print a warning for fewer points than it likes, and draw a sample of more
    points = {"min_points_per_centroid": 1, "max_points_per_centroid": len(vectors_ND)}
    kmeans = faiss.Kmeans(
        vectors_ND.shape[1], clusters, niter=ITERATIONS, spherical=True, seed=seed % (1 << 31), **points
    )
    try:
        kmeans.train(vectors_ND)
    finally:
        faiss.omp_set_num_threads(threads)
    return _chained(np.array(kmeans.centroids, np.float32))


def nearest_centroids(vectors_ND: np.ndarray, centroids_CD: np.ndarray) -> np.ndarray:
    """Return the number of the most similar centroid of each vector, (N,) uint16."""
    nearest_N: np.ndarray = (vectors_ND @ centroids_CD.T).argmax(axis=1).astype(np.uint16)
    return nearest_N


def unit_vectors(vectors_ND: np.ndarray) -> np.ndarray:
    """Return the vectors with length 1, as contiguous float32; those of length 0 unchanged."""
    vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
    length_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    unit_ND: np.ndarray = vectors_ND / np.where(length_N1 > 0, length_N1, 1)
    return unit_ND


def _chained(centroids_CD: np.ndarray) -> np.ndarray:
    """Return the centroids in a greedy chain: each is followed by the most similar one of the rest."""
    rest = np.ones(len(centroids_CD), bool)
    chain = [0]
    rest[0] = False
    for _ in range(len(centroids_CD) - 1):
        chain.append(int(np.where(rest, centroids_CD @ centroids_CD[chain[-1]], -np.inf).argmax()))
        rest[chain[-1]] = False
    chained_CD: np.ndarray = centroids_CD[chain]
    return chained_CD
