"""What the flags of training say together: each mistake has its message, each flag its place in the objective."""

import pytest
from tiny import make_tiny

from raybge.cli.options import TrainOptions
from raybge.cli.parser import build
from raybge.losses.objective import Objective
from raybge.model.folder import FolderSettings, vector_width, write_settings
from raybge.training.spec import check_recipe, objective_of, sub_batch_size_of
from raybge.training.trainer_arguments import check
from raybge.util.errors import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny")


def arguments(model: str, **flags) -> TrainOptions:
    return build(TrainOptions, {"model_name_or_path": model, "train_data": ["d"], "output_dir": "o", **flags})


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"temperature": 0.0}, "--temperature must be above 0, found 0.0"),
        ({"temperature": 0.6}, "--temperature must be at most 0.5 with normalised vectors, found 0.6"),
        ({"train_group_size": 0}, "--train_group_size must be at least 1, found 0"),
        ({"score_block": 0}, "--score_block must be at least 1, found 0"),
        ({"sub_batch_size": 0}, "--sub_batch_size must be at least 1, or -1"),
        ({"shuffle_ratio": 1.5}, "--shuffle_ratio must be from 0 to 1, found 1.5"),
        ({"use_mrl": True}, "--use_mrl needs --mrl_dims"),
        ({"use_mrl": True, "mrl_dims": [8, 17]}, "--mrl_dims must be from 1 to 16, the model's width, found 17"),
        ({"use_mrl": True, "mrl_dims": [0]}, "--mrl_dims must be from 1 to 16"),
        ({"use_mrl": True, "mrl_dims": [8, 8]}, "--mrl_dims names a length twice: 8 8"),
        ({"mrl_dims": [8]}, "--mrl_dims .* it needs --use_mrl"),
        ({"kd_loss_type": "m3_kd_loss"}, "--kd_loss_type .* it needs --knowledge_distillation"),
        ({"knowledge_distillation": True, "train_group_size": 1}, "--train_group_size must be above 1"),
        ({"bidirectional": True, "use_inbatch_neg": False}, "--bidirectional .* needs --use_inbatch_neg"),
        ({"guide_model": "nowhere/at/all", "false_negative_margin": 0.1}, "--guide_model nowhere/at/all: no such"),
        ({"guide_model": "m"}, "--guide_model .* it needs --false_negative_margin"),
        ({"lora_rank": 8}, "--lora_rank .* it needs --use_lora"),
        ({"dataset_weights": ["a=0"]}, "a=0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_named(tiny, flags, says):
    given = arguments(tiny, **flags)
    with pytest.raises(UserError, match=says):
        check_recipe(given)
        check(given)


def test_what_is_right_passes(tiny):
    flags = {"use_mrl": True, "mrl_dims": [8, 16], "knowledge_distillation": True, "kd_loss_type": "m3_kd_loss"}
    flags |= {"guide_model": tiny, "false_negative_margin": 0.0, "bidirectional": True, "sub_batch_size": -1}
    check_recipe(arguments(tiny, **flags))
    check_recipe(arguments(tiny, temperature=0.9, normalize_embeddings=False))  # scores of any size


def test_every_flag_of_the_objective_has_its_place(tiny):
    assert objective_of(arguments(tiny), 8) == Objective(0.02, block=8)
    flags = {"temperature": 0.05, "use_inbatch_neg": False, "negatives_cross_device": False, "bidirectional": True}
    flags |= {"knowledge_distillation": True, "kd_loss_type": "m3_kd_loss", "use_mrl": True, "mrl_dims": [4, 8]}
    flags |= {
        "normalize_embeddings": False,
        "mask_known_positives": False,
        "false_negative_margin": 0.2,
        "score_block": 64,
    }
    assert objective_of(arguments(tiny, **flags), 3) == Objective(
        0.05, False, False, 3, True, "m3_kd_loss", (4, 8), False, False, 0.2, 64
    )


def test_sub_batches_of_the_recipe(tiny):
    sizes = {given: sub_batch_size_of(arguments(tiny, sub_batch_size=given)) for given in (None, -1, 16)}
    assert sizes == {None: None, -1: None, 16: 16}


def test_width_is_read_without_loading_the_model(tiny, tmp_path):
    assert vector_width(tiny) == 16
    inside = tmp_path / "0_Transformer"
    make_tiny(inside)
    write_settings(tmp_path, FolderSettings(), 16, {})
    modules = (tmp_path / "modules.json").read_text()
    (tmp_path / "modules.json").write_text(modules.replace('"path": ""', '"path": "0_Transformer"', 1))
    assert vector_width(str(tmp_path)) == 16
    assert vector_width(str(tmp_path / "1_Pooling")) is None
