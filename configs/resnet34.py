"""ResNet-34 on ImageNet-1K by the recipe A2 of "ResNet strikes back".

    python -m metaformer_jax.main --config=configs/resnet34.py \
        --config.data.path=/path/to/imagenet

Hardware: the batch of 2048 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Expected: 75.5% top-1, published (arXiv 2111.11418, table 2); not trained here.
Recipe: `recipes.rsb_a2`.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.rsb_a2("resnet34")
