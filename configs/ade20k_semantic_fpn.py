r"""Semantic FPN on ADE20K (arXiv 2111.11418, table 4).

    python -m metaformer_jax.main \
        --config=configs/ade20k_semantic_fpn.py:poolformer_s12 \
        --config.data.path=/path/to/ADEChallengeData2016

Settings: segmentation/configs/sem_fpn of github.com/sail-sg/poolformer. The
published weights of ImageNet-1K are downloaded; those of ResNet-V1c are files
of download.openmmlab.com/pretrain/third_party, which `--config.init` names.
docs/segmentation.md compares the results.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import segmentation

SOURCE = "arXiv 2111.11418, table 4"

# The initial weights, if they are not the model's of its table; published mIoU.
VARIANTS = {
    "poolformer_s12": (None, 37.2),
    "poolformer_s24": (None, 40.3),
    "poolformer_s36": (None, 42.0),
    "poolformer_m36": (None, 42.4),
    "poolformer_m48": (None, 42.7),
    "resnet18": ("resnet18_v1c-b5776b93.pth", 32.9),
    "resnet50": ("resnet50_v1c-2cccc1ad.pth", 36.7),
    "resnet101": ("resnet101_v1c-e67eebb6.pth", 38.8),
    "pvt_tiny": (None, 35.7),
    "pvt_small": (None, 39.8),
    "pvt_medium": (None, 41.6),
    "pvt_large": (None, 42.1),
}

NOTES = {
    "poolformer_s24": "the paper prints 23.2 M parameters",
    "resnet*": "with a stem of three convolutions, ResNet-V1c",
    "pvt_*": "settings of segmentation/ of github.com/whai362/PVT",
}


def get_config(variant=None):
  init, _ = recipes.variant(VARIANTS, variant)
  return segmentation.semantic_fpn(variant, init and f"~/data/{init}")
