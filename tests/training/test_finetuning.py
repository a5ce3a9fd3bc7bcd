"""Registers added and learned, fine-tuning: the result is plain timm, only what shall move moves, and a kill loses nothing."""

import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from regvit.data.manifest import read_dataset, write_dataset
from regvit.data.rows import Row
from regvit.data.transform import Transform
from regvit.models.backbones import create, load_backbone, save_backbone
from regvit.models.positions import set_image_size
from regvit.models.sources import create_empty
from regvit.models.tokens import TokenLayout
from regvit.registers.outliers import patch_norms
from regvit.training import finetuning
from regvit.training.augmentation import TrainingBatches, batch_of
from regvit.training.classifier import ReadoutClassifier
from regvit.training.finetuning import finetune
from regvit.training.recipe import Recipe, parameter_groups, unfreeze
from regvit.training.register_tokens import add_register_tokens

ARGS = {"num_classes": 0, "img_size": 32, "dynamic_img_size": True}
SEEN = Transform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RECIPE = Recipe(steps=6, batch_size=6, readout="cls", warmup=2, validate_every=3)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Red, green and blue squares on grey: a data set that is learned in a few steps."""
    folder, rows, rng = tmp_path_factory.mktemp("colours"), [], np.random.default_rng(0)
    for i in range(36):
        pixels = rng.integers(100, 150, (40, 40, 3), dtype=np.uint8)
        pixels[8:32, 8:32, i % 3] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
        split = ("train", "train", "val", "test")[i // 3 % 4]
        rows.append(Row(str(i), f"{i}.png", ("red", "green", "blue")[i % 3], split))
    write_dataset(folder, "colours", rows, ("red", "green", "blue"), {})
    return read_dataset(folder)


def tiny(registers: int = 0, architecture: str = "test_vit", seed: int = 0, **changes):
    """timm's smallest transformer, with registers added."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create(architecture, ARGS | changes)
    return add_register_tokens(model, architecture, ARGS | changes, registers, seed)


def state_of(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


# Registers are timm's own.


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_a_model_trained_with_registers_opens_in_plain_timm_strictly_and_gives_the_same_outputs(
    no_embed_class, colours, tmp_path
):
    model, args = tiny(4, no_embed_class=no_embed_class)
    finetune(model, colours, SEEN, replace(RECIPE, registers=4, readout="cls_reg"), tmp_path / "work")
    about = {"name": "mine", "architecture": "test_vit", "model_args": args, "source": "test", "licence": "MIT"}
    save_backbone(tmp_path / "mine", model, transform=SEEN, trained={"steps": 6}, **about)
    plain = timm.create_model("test_vit", reg_tokens=4, no_embed_class=no_embed_class, **ARGS).eval()
    plain.load_state_dict(load_file(tmp_path / "mine/weights.safetensors"), strict=True)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, theirs = (m.forward_features(images) for m in (load_backbone(tmp_path / "mine").model, plain))
    assert (ours - theirs).abs().max() <= 1e-6 and ours.shape[1] == 1 + 4 + 4
    info = load_backbone(tmp_path / "mine").info
    assert info["trained_registers"] == 4 and info["trained"] == {"steps": 6}


def test_added_registers_leave_all_else_as_it_was_and_differ_from_each_other():
    before = state_of(tiny()[0])
    model, args = tiny(2)
    after = state_of(model)
    assert args == ARGS | {"reg_tokens": 2} and TokenLayout.of(model) == TokenLayout(cls=1, trained=2)
    positions = after.pop("pos_embed")
    assert torch.equal(torch.cat([positions[:, :1], positions[:, 3:]], 1), before["pos_embed"])
    assert not positions[:, 1:3].any()
    tokens = after.pop("reg_token")[0]
    assert (tokens[0] != tokens[1]).all() and all(torch.equal(after[name], before[name]) for name in after)


def test_positions_at_another_size_come_from_the_table_that_was_trained(colours, tmp_path):
    model, _ = tiny()
    set_image_size(model, 64)
    model, _ = add_register_tokens(model, "test_vit", ARGS | {"img_size": 64}, 3)
    table = model.trained_positions
    assert table.prefix == 4 and table.table.shape[1] == 4 + 4  # the grid of 32 px
    recipe = replace(RECIPE, steps=2, registers=3, learning_rate=0.1)
    finetune(model, colours, replace(SEEN, size=64), replace(recipe, unfreeze="none"), tmp_path / "alone")
    assert torch.equal(model.trained_positions.table, table.table)
    finetune(model, colours, replace(SEEN, size=64), recipe, tmp_path / "all")
    assert torch.equal(model.trained_positions.table, model.pos_embed) and model.trained_positions.prefix == 4


def test_models_that_cannot_take_registers_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"timm's Eva .* takes no reg_tokens; train.registers needs a VisionTransformer"
    ):
        add_register_tokens(create_empty("eva02_tiny_patch14_224"), "eva02_tiny_patch14_224", {}, 1)
    with pytest.raises(ValueError, match=r"has 2 registers already; leave train.registers out"):
        add_register_tokens(tiny(2)[0], "test_vit", {}, 1)


# What is trained, and how fast.


@pytest.mark.parametrize(
    ("part", "moved"),
    [("none", {"reg_token"}), ("last_2", {"reg_token", "blocks.4.", "blocks.5.", "norm."}), ("all", {""})],
)
def test_only_what_is_unfrozen_moves(part, moved, colours, tmp_path):
    model, _ = tiny(1)
    before = state_of(model)
    recipe = replace(RECIPE, registers=1, readout="cls_reg", unfreeze=part, learning_rate=1e-2)
    finetune(model, colours, SEEN, recipe, tmp_path)
    found = changed(before, state_of(model))
    expected = {name for name in before if name.startswith(tuple(moved))}
    assert found == expected and not any(p.requires_grad for p in model.parameters())


def test_rates_rise_then_fall_by_a_cosine_and_are_smaller_the_deeper_a_layer_lies():
    recipe = Recipe(steps=10, warmup=4, registers=1, learning_rate=1.0, token_learning_rate=7.0, head_learning_rate=3.0,
                    layer_decay=0.5)  # fmt: skip
    assert [recipe.rate(step) for step in (0, 3, 5)] == pytest.approx([0.25, 0.5 * (1 + math.cos(0.3 * math.pi)), 0.5])
    model, _ = tiny(1)
    unfreeze(model, recipe)
    groups = list(parameter_groups(model, torch.nn.Linear(2, 2), recipe))
    by_id = {id(p): group for group in groups for p in group["params"]}
    rates = {name: by_id[id(p)]["lr"] for name, p in model.named_parameters()}
    assert rates["reg_token"] == 7.0 and groups[-1]["lr"] == 3.0 and rates["norm.weight"] == 1.0
    assert [rates[f"blocks.{i}.mlp.fc1.weight"] for i in (5, 4, 0)] == [1.0, 0.5, 2.0**-5]
    assert rates["pos_embed"] == 2.0**-6
    decays = {name: by_id[id(p)]["weight_decay"] for name, p in model.named_parameters()}
    assert {name for name, decay in decays.items() if decay} == {name for name, p in model.named_parameters()
                                                                 if p.ndim > 1 and "token" not in name and "pos_" not in name}  # fmt: skip


def test_an_epoch_shows_every_image_once_and_a_batch_is_augmented_by_its_step_alone(colours):
    seen = [batch_of(10, 5, 0, step).tolist() for step in range(4)]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(10)) and seen[:2] != seen[2:]
    train = colours.subset("train")
    batches = TrainingBatches(train, SEEN, replace(RECIPE, colour_jitter=0.3))
    whole, late = list(batches.from_step(0)), list(batches.from_step(4))
    assert all(torch.equal(a, b) for pair in zip(whole[4:], late, strict=True) for a, b in zip(*pair, strict=True))
    assert not torch.equal(whole[0][0], whole[3][0])
    plain = TrainingBatches(train, SEEN, replace(RECIPE, crop_scale=1.0, flip=False))
    pixels, labels = next(plain.from_step(0))
    rows = batch_of(len(train), 6, 0, 0)
    assert torch.equal(pixels, torch.stack([SEEN.load(train.image_path(row)) for row in rows]))
    assert labels.tolist() == train.labels()[rows].tolist()


def test_the_weights_that_are_kept_are_those_of_the_best_validation_accuracy(colours, tmp_path):
    recipe = replace(RECIPE, steps=40, validate_every=5, learning_rate=3e-3, head_learning_rate=1e-2, crop_scale=1.0)
    model, _ = tiny()
    trained = finetune(model, colours, SEEN, recipe, tmp_path)
    accuracies = {step: accuracy for step, _, accuracy in trained.curve}
    assert list(accuracies) == list(range(5, 41, 5)) and trained.val_top1 == max(accuracies.values()) > 0.9
    assert trained.step == min(step for step, accuracy in accuracies.items() if accuracy == trained.val_top1)
    assert trained.curve[-1][1] < trained.curve[0][1]


# Along the way.


def test_norms_along_the_way_begin_with_those_of_the_model_as_it_came(colours, tmp_path):
    model, _ = tiny()
    val = colours.subset("val")
    images = torch.stack([SEEN.load(val.image_path(i)) for i in range(len(val))])
    norms = patch_norms(model, [SEEN.normalise(images)])
    trained = finetune(model, colours, SEEN, replace(RECIPE, checkpoints=(0, 4)), tmp_path)
    assert [row[:2] for row in trained.norms] == [(step, layer) for step in (0, 4) for layer in range(6)]
    for row, of_layer in zip(trained.norms, norms, strict=False):
        assert row[2:5] == pytest.approx(np.quantile(of_layer, (0.5, 0.99, 1)), rel=1e-5)
    assert trained.norms[6][2] != trained.norms[0][2]


def test_a_training_that_is_broken_off_goes_on_and_ends_with_the_same_weights(colours, tmp_path, monkeypatch):
    recipe = replace(RECIPE, registers=2, unfreeze="last_2", checkpoints=(2, 6))
    whole, _ = tiny(2)
    expected = finetune(whole, colours, SEEN, recipe, tmp_path / "whole")
    monkeypatch.setattr(finetuning, "SAVE_EVERY", 0.0)
    save = finetuning._State.save

    def interrupted(state, path):
        save(state, path)
        if state.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetuning._State, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny(2)[0], colours, SEEN, recipe, tmp_path / "broken")
    monkeypatch.setattr(finetuning._State, "save", save)
    again, _ = tiny(2)
    seen = []
    monkeypatch.setattr(finetuning._State, "update", lambda state, *batch, update=finetuning._State.update: (
        seen.append(state.step), update(state, *batch)))  # fmt: skip
    found = finetune(again, colours, SEEN, recipe, tmp_path / "broken")
    assert seen == [4, 5] and repr(found) == repr(expected)  # nan where there are no outliers
    assert not changed(state_of(whole), state_of(again))
    finetune(tiny(2)[0], colours, SEEN, replace(recipe, steps=5), tmp_path / "broken")
    assert seen[2:] == [0, 1, 2, 3, 4]  # of another recipe: anew


def test_what_cannot_be_trained_is_refused_with_its_cure(colours, tmp_path):
    for recipe, said in (
        (replace(RECIPE, unfreeze="none"), "so nothing would be trained"),
        (replace(RECIPE, unfreeze="last_9"), "the model has 6 blocks; use last_1 to last_6"),
        (replace(RECIPE, readout="cls_reg"), "the model has no reg_mean; take another readout"),
        (replace(RECIPE, learning_rate=1e30, steps=30), "take smaller learning rates"),
    ):
        with pytest.raises(ValueError, match=said):
            finetune(tiny()[0], colours, SEEN, recipe, tmp_path)
    unlabelled = replace(colours, rows=tuple(replace(row, label="") for row in colours.rows))
    with pytest.raises(ValueError, match="some without a label; label them all"):
        finetune(tiny()[0], unlabelled, SEEN, RECIPE, tmp_path)


def test_the_head_reads_what_the_readout_of_the_probes_reads():
    model, _ = tiny(2)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = model.forward_features(images)
    head = ReadoutClassifier(model, "cls_reg", 3, seed=1)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:3].mean(1)], 1) @ head.head.weight.T
    assert torch.allclose(head(images), expected, atol=1e-6)
    assert torch.equal(ReadoutClassifier(model, "cls_patch", 3, seed=1).head.weight, head.head.weight)
