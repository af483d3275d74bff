r"""RetinaNet on COCO (arXiv 2111.11418, table 3), the 1x schedule.

    python -m metaformer_jax.main \
        --config=configs/coco_retinanet.py:poolformer_s12 \
        --config.data.path=/path/to/coco

Settings: detection/configs of github.com/sail-sg/poolformer, for mmdetection
2.19. The published weights of ImageNet-1K are downloaded. docs/detection.md
compares the results.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import detection

SOURCE = "1x; sources in docs/detection.md"

# Published box AP.
VARIANTS = {
    "poolformer_s12": (36.2,),
    "poolformer_s24": (38.9,),
    "poolformer_s36": (39.5,),
    "resnet18": (31.8,),
    "resnet50": (36.3,),
    "resnet101": (38.5,),
    "pvt_tiny": (36.7,),
    "pvt_small": (40.4,),
    "pvt_medium": (41.9,),
    "pvt_large": (42.6,),
    "convformer_s18": (None,),
    "caformer_s18": (None,),
}

NOTES = {
    "resnet*": "settings of mmdetection; its initial weights are torchvision's",
    "pvt_*": "AP and settings of detection/ of github.com/whai362/PVT",
    "c*former_s18": "settings are not published; those of Swin",
}


def get_config(variant=None):
  recipes.variant(VARIANTS, variant)
  return detection.retinanet(variant)
