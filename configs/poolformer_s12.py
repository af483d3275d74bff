"""PoolFormer-S12 on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/poolformer_s12.py \
        --config.data.path=/path/to/imagenet

Hardware: the batch of 4096 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Published: 77.2% top-1 with the whole recipe (arXiv 2111.11418, table 1); see
`recipes.poolformer_imagenet` for what is not here yet.
"""

from metaformer_jax import recipes


def get_config():
  return recipes.poolformer_imagenet("poolformer_s12", drop_path_rate=0.1)
