"""PVT-Tiny on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/pvt_tiny.py \
        --config.data.path=/path/to/imagenet

Hardware: the batch of 1024 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Expected: 75.1% top-1, published (arXiv 2102.12122); not trained here.
Recipe: `recipes.pvt`.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.pvt("pvt_tiny")
