"""Spec of the contrastive objective: read from the flags and checked before anything loads.

Importing this module imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raybge.cli.checks import check_requires
from raybge.cli.options import TrainOptions
from raybge.model.folder import read_settings, vector_width
from raybge.training.spec import device_batch_of
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.losses.objective import Objective

# With normalized vectors scores lie between -1 and 1: divided by more than this, no passage stands out.
HIGHEST_TEMPERATURE = 0.5
# Strengths with which the weights were published, see `HardnessWeights`.
_STRENGTHS = {"in_batch_negatives": 9.0, "hard_negatives": 5.0, "all_negatives": 5.0}
NO_MARGIN = -2.0  # two cosines never differ by more
_FIRST_DIRECTION = "query_to_doc"
_UNSCALED = {"cosent": "compares the order of the teacher's scores alone", "soft_labels": "has --score_bands"}


@dataclass(frozen=True)
class ObjectiveSpec:
    """Keyword arguments of `Objective`, with the same names; see `Objective` for their meaning.

    `normalized` is not among them: without a flag the model's folder decides.
    """

    temperature: float
    in_batch: bool
    cross_device: bool
    block: int
    directions: tuple[str, ...]
    partition_mode: str
    hardness_mode: str | None
    hardness_strength: float
    hardness_normalize: bool
    distillation: str | None
    teacher_temperature: float
    contrastive_weight: float
    score_bands: tuple[tuple[float, float], ...]
    mrl_dims: tuple[int, ...]
    mask_known: bool
    margin: float | None
    score_block: int | None

    @classmethod
    def from_options(cls, options: TrainOptions) -> ObjectiveSpec:
        """Read and check the flags of the objective.

        Args:
            options: the command's flags.

        Returns:
            The spec.

        Raises:
            UserError: a temperature or Matryoshka dimension that this model cannot be trained with.
        """
        _check_temperature(options)
        _check_mrl_dims(options)
        directions = options.directions or [_FIRST_DIRECTION]
        strength = options.hardness_strength
        return cls(
            temperature=options.temperature,
            in_batch=options.use_inbatch_neg,
            cross_device=options.negatives_cross_device,
            block=device_batch_of(options),
            directions=(_FIRST_DIRECTION, "doc_to_query")
            if options.bidirectional
            else tuple(dict.fromkeys(directions)),
            partition_mode="per_direction" if options.bidirectional else options.partition_mode,
            hardness_mode=options.hardness_mode,
            hardness_strength=_STRENGTHS.get(options.hardness_mode or "", 0.0) if strength is None else strength,
            hardness_normalize=options.hardness_normalize,
            distillation=options.kd_loss_type if options.knowledge_distillation else None,
            teacher_temperature=options.teacher_temperature,
            contrastive_weight=options.contrastive_weight,
            score_bands=_score_bands(options),
            mrl_dims=tuple(options.mrl_dims or ()),
            mask_known=options.mask_known_positives,
            margin=false_negative_margin(options),
            score_block=options.score_block,
        )

    def objective(self, normalized: bool) -> Objective:
        """Return the objective for vectors that are `normalized` to length 1, or not; imports torch."""
        from raybge.losses.objective import Objective

        return Objective(**vars(self), normalized=normalized)


def false_negative_margin(options: TrainOptions) -> float | None:
    """Return --false_negative_margin, by default 0 for batches of similar queries; None if it excludes nothing."""
    margin = options.false_negative_margin
    if margin is None:
        return 0.0 if options.batch_by == "similarity" else None
    return margin if margin > NO_MARGIN else None


def _score_bands(options: TrainOptions) -> tuple[tuple[float, float], ...]:
    """Return the bounds of --score_bands, ascending, each with its label."""
    bands: dict[float, float] = {}
    for text in options.score_bands or ():
        bound_text, _, label_text = text.partition("=")
        try:
            bound, label = float(bound_text), float(label_text)
        except ValueError:
            bound = label = math.nan
        if not (math.isfinite(bound) and 0 <= label < math.inf) or bound in bands:
            raise UserError(
                f"--score_bands {text}: expected BOUND=LABEL, a teacher score and the label from 0 up of passages that "
                "reach it, each bound once; for example 0.3=0.5 0.8=1"
            )
        bands[bound] = label
    if bands and not any(bands.values()):
        raise UserError("--score_bands: at least one label must be above 0")
    return tuple(sorted(bands.items()))


# --- checks of the flags ----------------------------------------------------------------------------------------------


def check_objective_options(options: TrainOptions) -> None:
    """Check the flags of the objective that need no model.

    Args:
        options: the command's flags.

    Raises:
        UserError: a value out of range, or flags that do not go together.
    """
    if options.temperature <= 0:
        raise UserError(f"--temperature must be above 0, found {options.temperature}")
    _check_distillation(options)
    check_requires(options, "mrl_dims", "use_mrl")
    _check_directions(options)
    _check_hardness(options)


def _check_distillation(options: TrainOptions) -> None:
    """Raise UserError for flags of the distillation that are out of range or do not go together."""
    for name in ("kd_loss_type", "teacher_temperature", "contrastive_weight", "score_bands"):
        check_requires(options, name, "knowledge_distillation")
    if not options.knowledge_distillation:
        return
    kind = options.kd_loss_type
    if options.train_group_size < 2:
        raise UserError("--knowledge_distillation compares the passages of a group: --train_group_size must be above 1")
    if options.teacher_temperature <= 0:
        raise UserError(f"--teacher_temperature must be above 0, found {options.teacher_temperature}")
    if options.teacher_temperature != 1 and kind in _UNSCALED:
        raise UserError(f"--teacher_temperature has no effect with --kd_loss_type {kind}, which {_UNSCALED[kind]}")
    if options.contrastive_weight < 0:
        raise UserError(f"--contrastive_weight must be at least 0, found {options.contrastive_weight}")
    if options.contrastive_weight != 1 and kind in ("m3_kd_loss", "soft_labels"):
        raise UserError(
            f"--contrastive_weight has no effect with --kd_loss_type {kind}, which is a contrastive loss itself"
        )
    if (kind == "soft_labels") != bool(options.score_bands):
        raise UserError(
            "--kd_loss_type soft_labels and --score_bands belong together: BOUND=LABEL ... gives each passage the "
            "label of the highest bound that its teacher score reaches, for example --score_bands 0.3=0.5 0.8=1"
        )
    if kind == "cosent" and not (options.use_inbatch_neg and options.negatives_cross_device):
        raise UserError(
            "--kd_loss_type cosent orders the pairs of all groups of a step: it requires --use_inbatch_neg and "
            "--negatives_cross_device"
        )


def _check_directions(options: TrainOptions) -> None:
    """Raise UserError for directions that cannot be trained together or with other flags."""
    directions = options.directions
    if options.bidirectional and directions is not None:
        raise UserError(
            "--bidirectional is short for --directions query_to_doc doc_to_query --partition_mode per_direction: give "
            "one of --bidirectional and --directions"
        )
    if options.bidirectional and not options.use_inbatch_neg:
        raise UserError("--bidirectional searches a query among those of other groups: it requires --use_inbatch_neg")
    check_requires(options, "partition_mode", "directions")
    if directions is None:
        return
    if _FIRST_DIRECTION not in directions:
        raise UserError(f"--directions must have {_FIRST_DIRECTION}, which compares each query with its positive")
    others = sorted({*directions} - {_FIRST_DIRECTION})
    if not others:
        if options.partition_mode == "per_direction":
            raise UserError(f"--partition_mode per_direction requires a direction besides {_FIRST_DIRECTION}")
        return
    if not options.use_inbatch_neg:
        raise UserError(f"--directions {others[0]} compares texts of different groups: it requires --use_inbatch_neg")
    if options.partition_mode == "joint" and options.knowledge_distillation and options.kd_loss_type == "m3_kd_loss":
        raise UserError(
            "--directions: --kd_loss_type m3_kd_loss replaces the softmax that --partition_mode joint extends; use "
            "another distillation loss, or --bidirectional"
        )
    if options.partition_mode == "per_direction" and (wrong := [each for each in others if each != "doc_to_query"]):
        raise UserError(
            f"--partition_mode per_direction: {wrong[0]} has no positive and thus no loss of its own; use "
            "--partition_mode joint"
        )


def _check_hardness(options: TrainOptions) -> None:
    """Raise UserError for weights of negatives that are out of range or have nothing to weight."""
    for name in ("hardness_strength", "hardness_normalize"):
        check_requires(options, name, "hardness_mode")
    mode = options.hardness_mode
    if mode is None:
        return
    if options.hardness_strength is not None and options.hardness_strength <= 0:
        raise UserError(f"--hardness_strength must be above 0, found {options.hardness_strength}")
    if options.knowledge_distillation and options.kd_loss_type == "m3_kd_loss":
        raise UserError("--hardness_mode weights the negatives of the loss that --kd_loss_type m3_kd_loss replaces")
    if mode == "in_batch_negatives" and not options.use_inbatch_neg:
        raise UserError("--hardness_mode in_batch_negatives requires --use_inbatch_neg")
    if mode == "hard_negatives" and options.train_group_size < 2:
        raise UserError(
            "--hardness_mode hard_negatives weights the negatives of a group: --train_group_size must be above 1"
        )


def _check_temperature(options: TrainOptions) -> None:
    """Raise UserError for a temperature at which no score of normalized vectors stands out."""
    if options.temperature <= HIGHEST_TEMPERATURE:
        return
    normalized = options.normalize_embeddings
    if normalized is None:
        normalized = read_settings(options.model_name_or_path, options.cache_dir, options.token).normalize
    if normalized:
        raise UserError(
            f"--temperature must be at most {HIGHEST_TEMPERATURE} with normalized vectors, found "
            f"{options.temperature}: common values are 0.01 to 0.05"
        )


def _check_mrl_dims(options: TrainOptions) -> None:
    """Raise UserError for Matryoshka dimensions that are missing, repeated or wider than the model's vectors."""
    if not options.use_mrl:
        return
    dims = options.mrl_dims
    if not dims:
        raise UserError("--use_mrl requires --mrl_dims, for example --mrl_dims 64 128 256")
    width = vector_width(options.config_name or options.model_name_or_path, options.cache_dir, options.token)
    for dim in dims:
        if dim < 1 or (width is not None and dim > width):
            most = f" to {width}, the model's width" if width else " up"
            raise UserError(f"--mrl_dims must be from 1{most}, found {dim}")
    if len(set(dims)) < len(dims):
        raise UserError(f"--mrl_dims must be different lengths, found {' '.join(map(str, dims))}")
