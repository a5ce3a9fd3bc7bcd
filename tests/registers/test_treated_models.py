"""What is done to a model while it has registers is done to it: moved, cast, resized, trained, loaded, pickled, compiled."""

import copy
import pickle
from itertools import product

import pytest
import torch
from stock_models import NEURONS, features, images, make

from regvit import TokenLayout, add_test_time_registers, remove_test_time_registers

DONE = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float64": lambda model: model.double(),
    "another size": lambda model: model.set_input_size(img_size=(96, 96)),
    "trained": lambda model: [parameter.data.add_(0.01) for parameter in model.parameters()],
    "loaded": lambda model: model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()}),
    "pickled": lambda model: None,
}


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224", "test_vit2"])
@pytest.mark.parametrize("done", DONE)
def test_what_was_done_in_between_stays_when_the_registers_go(name, done):
    model = make(name, **({} if name.startswith("test") else {"depth": 3, "img_size": 64}))
    plain = copy.deepcopy(model)
    add_test_time_registers(model, NEURONS, 2)
    DONE[done](model), DONE[done](plain)
    if done == "pickled":
        model = pickle.loads(pickle.dumps(model))
    x = images(plain).to(next(plain.parameters()).dtype)
    treated = features(model, x)
    remove_test_time_registers(model)
    assert torch.equal(features(model, x), features(plain, x))
    assert type(model) is type(plain)
    add_test_time_registers(plain, NEURONS, 2)  # done first, treated then
    assert torch.equal(features(plain, x), treated)


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224", "test_vit2"])
def test_a_model_that_was_moved_with_its_registers_lies_in_one_place_without_them(name):
    model = make(name, **({} if name.startswith("test") else {"depth": 3, "img_size": 64}))
    handle = add_test_time_registers(model, NEURONS, 2)
    model.to("meta").half()
    handle.remove()
    left = {(value.device.type, value.dtype) for value in (*model.parameters(), *model.buffers())}
    assert left == {("meta", torch.float16)}


@pytest.mark.parametrize(("name", "before"), [("test_vit", True), ("test_vit2", False)])
def test_a_model_is_fine_tuned_with_its_registers_which_stay_zero(name, before):
    model = make(name, num_classes=5).requires_grad_(True)
    trained = TokenLayout.of(model).trained
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3) if before else None
    handle = add_test_time_registers(model, NEURONS, 2)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = images(model, 6), torch.tensor([0, 1, 2, 3, 4, 0])
    old = {key: value.clone() for key, value in model.state_dict().items()}
    losses = []
    for _ in range(6):
        losses.append(torch.nn.functional.cross_entropy(model(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not model.reg_token[:, trained:].any()
    assert all(parameter.grad is not None for parameter in model.parameters())
    state = model.state_dict()
    assert not torch.equal(state["pos_embed"], old["pos_embed"])
    handle.remove()
    optimizer.step()
    assert state.keys() == model.state_dict().keys()


PARTS = ("patch_embed", "blocks.0.attn", "blocks.0.mlp.fc2")


def wrap(model, part):
    model.set_submodule(part, torch.compile(model.get_submodule(part), backend="eager"))


COMPILED = {  # what is treated, and what is run
    "the model, wrapper treated": lambda model: (torch.compile(model, backend="eager"),) * 2,
    "in place": lambda model: (model.compile(backend="eager"), (model, model))[1],
    "forward_features": lambda model: (model, torch.compile(model.forward_features, backend="eager")),
    "parts of it": lambda model: ([wrap(model, part) for part in PARTS], (model, model))[1],
    "its blocks": lambda model: ([block.compile(backend="eager") for block in model.blocks], (model, model))[1],
}


# Treated twice alike but for numbers, which what was compiled for the first must not be used for.
TREATMENTS = (([3, 5], {}), ([1, 9], {"scale": 0.5, "patches": "same"}))


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        *product(["vit_tiny_patch16_224"], sorted(COMPILED.keys() - {"parts of it"})),
        ("eva02_tiny_patch14_224", "parts of it"),
    ],
)
def test_a_compiled_model_gives_what_the_eager_one_gives_treated_alike(name, compiled):
    torch.compiler.reset()
    depth = 2 if compiled == "its blocks" else 1  # blocks share what was compiled
    model = make(name, depth=depth, img_size=56 if "eva" in name else 64)
    eager, x = copy.deepcopy(model), images(model)
    treated, run = COMPILED[compiled](model)
    forward = (lambda m: m.forward_features) if compiled == "forward_features" else (lambda m: m)
    with torch.no_grad():
        plain = forward(eager)(x)
        assert torch.allclose(run(x), plain, atol=1e-6)
        for units, options in TREATMENTS:
            neurons = dict.fromkeys(range(depth), units)
            with add_test_time_registers(eager, neurons, 1, **options):
                want = forward(eager)(x)
            with add_test_time_registers(treated, neurons, 1, **options):
                assert TokenLayout.of(treated).prefix == TokenLayout.of(eager).prefix + 1
                assert torch.allclose(run(x), want, atol=1e-6)
            assert torch.allclose(run(x), plain, atol=1e-6)
