"""Spec of --batch_by similarity: steps of groups whose queries are similar.

Importing this module imports no torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raybge.cli.options import LoopOptions, TrainOptions
from raybge.model.model_identity import model_identity
from raybge.model.spec import EncoderSpec
from raybge.search.kmeans import MAX_CLUSTERS
from raybge.search.metadata import metadata_path
from raybge.util.errors import UserError
from raybge.util.plural import plural

if TYPE_CHECKING:
    from raybge.data.order import Order

# With clusters of 8 batches a step is a random eighth of one, another in each epoch. TAS-B has 2,000 clusters.
STEPS_A_CLUSTER, MOST_BY_DEFAULT = 8, 2048
_ENCODE = "raybge.encode --kind query --text_field query --output_file X.npy"


@dataclass(frozen=True)
class SavedQueryVectors:
    """File of --batch_vectors: its absolute path, number of vectors and their width."""

    path: str
    rows: int
    dim: int


@dataclass(frozen=True)
class SimilaritySpec:
    """Steps of similar queries.

    Args:
        clusters: number of clusters; None: by the number of steps.
        encoder: model whose vectors are clustered, with the length of the queries in training.
        vectors: saved vectors, used in place of the model.
        masks_known: known positives of a query are none of its negatives.
        margin: a passage whose cosine is above the positive's minus this is no negative; None: no limit.
    """

    clusters: int | None
    encoder: EncoderSpec
    vectors: SavedQueryVectors | None
    masks_known: bool
    margin: float | None

    @classmethod
    def from_options(cls, options: LoopOptions) -> SimilaritySpec | None:
        """Read and check the flags.

        Args:
            options: the command's flags.

        Returns:
            The spec; None for steps of random rows.

        Raises:
            UserError: flags that do not go together, a number out of range, or a file of vectors that is not of the
                queries or of this model.
        """
        from raybge.training.tasks.objective_spec import false_negative_margin

        if not isinstance(options, TrainOptions):
            return None
        if options.batch_by != "similarity":
            for name in ("batch_clusters", "batch_vectors"):
                if getattr(options, name) is not None:
                    raise UserError(f"--{name} requires --batch_by similarity")
            return None
        if not options.use_inbatch_neg:
            raise UserError(
                "--batch_by similarity makes groups of a step negatives of each other: it requires --use_inbatch_neg"
            )
        if options.dataset_weights:
            raise UserError("--batch_by similarity has each row once an epoch: give one of it and --dataset_weights")
        clusters = options.batch_clusters
        if clusters is not None and not 2 <= clusters <= MAX_CLUSTERS:
            raise UserError(f"--batch_clusters must be from 2 to {MAX_CLUSTERS:,}, found {clusters:,}")
        encoder = EncoderSpec.from_options(
            options, use_fp16=False, query_max_length=options.query_max_len, passage_max_length=None, lora=None
        )
        vectors = _saved_vectors(options) if options.batch_vectors else None
        return cls(clusters, encoder, vectors, options.mask_known_positives, false_negative_margin(options))

    def cluster_count(self, order: Order) -> int:
        """Return the number of clusters for the rows of an order.

        Args:
            order: order of the rows, whose number of steps counts.

        Returns:
            The number.

        Raises:
            UserError: there is a single step, or more clusters than steps.
        """
        if order.steps < 2:
            raise UserError(
                f"--batch_by similarity: the {plural(order.total, 'group')} make a single step of "
                f"{order.global_batch:,}; a smaller --global_batch_size makes more steps"
            )
        if self.clusters is None:
            return min(max(order.total // (STEPS_A_CLUSTER * order.global_batch), 2), MOST_BY_DEFAULT)
        if self.clusters > order.steps:
            raise UserError(
                f"--batch_clusters {self.clusters:,}: the {plural(order.total, 'group')} make {order.steps:,} steps of "
                f"{order.global_batch:,}, so that a cluster would not fill a step; at most {order.steps:,} can"
            )
        return self.clusters

    def describe(self, order: Order) -> str:
        """Return the plan line."""
        source = f"the vectors of {self.vectors.path}" if self.vectors else "the model's vectors before training"
        known = "known positives are masked" if self.masks_known else "known positives are not masked"
        margin = "no others"
        if self.margin is not None:
            margin = f"passages whose cosine is above the positive's minus {self.margin:g} (--false_negative_margin)"
        return (
            f"batches: of similar queries, from {self.cluster_count(order):,} clusters by {source}; false negatives: "
            f"{known}, and {margin}"
        )


def _saved_vectors(options: TrainOptions) -> SavedQueryVectors:
    """Return the file of --batch_vectors; UserError unless its metadata names queries and the model to train."""
    path = str(options.batch_vectors)
    subject = f"--batch_vectors {path}"
    if "://" in path or not path.endswith(".npy"):
        raise UserError(f"{subject}: expected a .npy file on a folder that all nodes share, written by {_ENCODE}")
    try:
        with open(metadata_path(path), encoding="utf-8") as file:
            content: dict[str, Any] = json.load(file)
        vectors_ND = np.load(path, mmap_mode="r")
        flags, model = dict(content["options"]), content["model"]
    except OSError as error:
        raise UserError(f"{subject}: {error.filename or path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{subject} was not written by {_ENCODE}, or by an older version: encode again") from None
    if (flags.get("kind"), flags.get("text_field"), flags.get("precision")) != ("query", "query", "float32"):
        raise UserError(f"{subject} does not hold the queries in float32; encode them with {_ENCODE}")
    if model != model_identity(options.model_name_or_path, options.cache_dir):
        raise UserError(
            f"{subject} holds vectors of another model ({flags.get('model_name_or_path')}) than --model_name_or_path "
            f"{options.model_name_or_path}; encode the queries with it, or leave out the flag"
        )
    return SavedQueryVectors(os.path.abspath(path), *vectors_ND.shape)
