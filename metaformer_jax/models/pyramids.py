"""The pyramids that PoolFormer is compared with: ResNet and PVT.

Source of MACs and top-1: arXiv 2111.11418, table 2, in which "RSB-ResNet" is a
ResNet trained by the recipe A2 of arXiv 2110.00476. The rest comes from timm
(resnet.py, its default_cfgs of the tag a2_in1k) and from the official PVT
(github.com/whai362/PVT, classification: pvt.py, datasets.py, README).
"""

from metaformer_jax.models import settings
from metaformer_jax.models.spec import ModelSpec

_SOURCE = "arXiv 2111.11418, table 2"

# Block, depths, parameters, GMACs, top-1
_RESNETS = {
    "resnet18": ("basic", (2, 2, 2, 2), 11_689_512, 1.8, 70.6),
    "resnet34": ("basic", (3, 4, 6, 3), 21_797_672, 3.7, 75.5),
    "resnet50": ("bottleneck", (3, 4, 6, 3), 25_557_032, 4.1, 79.8),
    "resnet101": ("bottleneck", (3, 4, 23, 3), 44_549_160, 7.9, 81.3),
    "resnet152": ("bottleneck", (3, 8, 36, 3), 60_192_808, 11.6, 81.8),
}

# Depths, parameters, GMACs, top-1
_PVTS = {
    "pvt_tiny": ((2, 2, 2, 2), 13_229_288, 1.9, 75.1),
    "pvt_small": ((3, 4, 6, 3), 24_485_864, 3.8, 79.8),
    "pvt_medium": ((3, 4, 18, 3), 44_208_104, 6.7, 81.2),
    "pvt_large": ((3, 8, 27, 3), 61_369_320, 9.8, 81.7),
}

MODELS = {
    name: ModelSpec(
        name=name, family="resnet",
        module="metaformer_jax.models.resnet:ResNet",
        settings=settings.ResNet(block=block, depths=depths),
        n_params=n_params, gmacs=gmacs, top1=top1, source=_SOURCE,
        checkpoint=f"timm/{name}.a2_in1k", crop_pct=0.95)
    for name, (block, depths, n_params, gmacs, top1) in _RESNETS.items()
} | {
    name: ModelSpec(
        name=name, family="pvt",
        module="metaformer_jax.models.pvt:PyramidVisionTransformer",
        settings=settings.PyramidVisionTransformer(depths=depths),
        n_params=n_params, gmacs=gmacs, top1=top1, source=_SOURCE,
        crop_pct=0.875,
        checkpoint="https://github.com/whai362/PVT/releases/download/v2/"
        f"{name}.pth")
    for name, (depths, n_params, gmacs, top1) in _PVTS.items()
}
