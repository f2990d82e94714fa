"""Digests: fixed values, since they name files on disk and identify the data of a checkpoint."""

from dataclasses import dataclass

import numpy as np

from raybge.util.digest import digest, fingerprint


def test_digests_of_json_values_are_stable():
    assert digest("a", 1, {"b": [2, None]}) == digest("a", 1, {"b": [2, None]})
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
    assert digest("a") == "f53b3155b302982e196b7645b7b614b1"


@dataclass
class Point:
    x: int
    y: object


def test_fingerprints_follow_types_shapes_and_values():
    values = [Point(1, 2), Point(2, 1), [1, 2], [[1], 2], np.arange(2), np.arange(2.0), np.arange(2)[None], {"x": 1}]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint(Point(1, np.zeros(3))) == fingerprint(Point(1, np.zeros(3)))
    assert fingerprint({"a": [1, np.arange(3)]}) == "11b5834001cc0c149dc71542"
