"""DeiT-B on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/deit_base_patch16_224.py \
        --config.data.path=/path/to/imagenet

Hardware: the batch of 1024 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Expected: 81.8% top-1, published (arXiv 2012.12877); not trained here.
Recipe: `recipes.deit`.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.deit("deit_base_patch16_224")
