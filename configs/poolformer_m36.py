r"""PoolFormer-M36 on ImageNet-1K, see docs/recipes.md.

    python -m metaformer_jax.main --config=configs/poolformer_m36.py \
        --config.data.path=/path/to/imagenet
"""

from metaformer_jax.recipes import classification


def get_config():
  return classification.poolformer("poolformer_m36", drop_path_rate=0.3)
