"""timm's own models with random weights, on which registers have an effect, and images for them."""

import timm
import torch

NEURONS = {1: [3, 5, 7], 2: [0]}


def make(name: str = "test_vit", **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **kwargs).eval()
    for parameter in model.parameters():  # stock LayerScale of 1e-5 would hide every effect
        if parameter.ndim == 1 and parameter.abs().max() <= 1e-4 and parameter.abs().max() > 0:
            torch.nn.init.ones_(parameter)
    return model


def images(model: torch.nn.Module, count: int = 2) -> torch.Tensor:
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or model.default_cfg["input_size"][1:]
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.forward_features(x)
