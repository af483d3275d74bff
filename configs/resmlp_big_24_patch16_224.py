"""ResMLP-B24 on ImageNet-1K.

    python -m metaformer_jax.main \
        --config=configs/resmlp_big_24_patch16_224.py \
        --config.data.path=/path/to/imagenet

Hardware: the batch of 1024 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Expected: 81.0% top-1, published (arXiv 2105.03404); not trained here.
Recipe: `recipes.resmlp`, which says what of it is not published.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.resmlp("resmlp_big_24_patch16_224")
