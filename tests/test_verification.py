import numpy as np
import pytest
import timm
import torch

from regvit.outliers import Detection
from regvit.verification import compare_with_intact


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False).eval()


def test_a_model_equals_itself(model):
    x = torch.randn(3, 3, 160, 160)
    outliers = np.zeros((3, 100), bool)
    outliers[0, 5] = outliers[2, 7] = True
    found = compare_with_intact(model, model, outliers, Detection(4, 1e9, 0.0), [x[:2], x[2:]], [4, 5])
    for field in ("cls_cosine", "patch_cosine", "outlier_patch_cosine"):
        values = getattr(found, field)
        assert np.isnan(values).tolist() == [False, True, False]  # image 1 has no outlier
        assert values[[0, 2]] == pytest.approx(1.0, abs=1e-5)
    assert np.allclose(found.cls_attention_on_outliers, found.intact_attention_on_outliers, equal_nan=True)
    assert found.cls_attention_on_registers[0] == 0
    assert found.outlier_fraction.tolist() == [0, 0, 0]


def test_attention_on_outliers_is_summed_over_the_marked_patches(model):
    x = torch.randn(1, 3, 160, 160)
    everywhere = np.ones((1, 100), bool)
    found = compare_with_intact(model, model, everywhere, Detection(4, 1e9, 0.0), [x], [5])
    assert 0.9 < found.cls_attention_on_outliers[0] < 1  # all but what CLS gives itself


def test_without_outliers_there_is_nothing_to_compare(model):
    with pytest.raises(ValueError, match="none of 1 images has an outlier"):
        compare_with_intact(model, model, np.zeros((1, 100), bool), Detection(4, 1.0, 0.0), [], [5])
