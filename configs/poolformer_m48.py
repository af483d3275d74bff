"""PoolFormer-M48 on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/poolformer_m48.py \
        --config.data.path=/path/to/imagenet

Hardware: the batch of 4096 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Expected: 82.5% top-1, published (arXiv 2111.11418, table 1); not trained here.
Recipe: `recipes.poolformer`, of arXiv 2111.11418 and its official train.py.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.poolformer("poolformer_m48", drop_path_rate=0.4)
