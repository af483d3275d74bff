"""PVT-Medium on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/pvt_medium.py \
        --config.data.path=/path/to/imagenet

Hardware: the batch of 1024 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Expected: 81.2% top-1, published (arXiv 2102.12122); not trained here.
Recipe: `recipes.pvt`.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.pvt("pvt_medium", drop_path_rate=0.3, clip_norm=1.0)
