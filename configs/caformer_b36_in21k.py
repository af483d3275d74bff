"""CAFormer-B36 on ImageNet-21K, 21,841 classes.

    python -m metaformer_jax.main --config=configs/caformer_b36_in21k.py \
        --config.data.path=/path/to/imagenet21k

Hardware: the batch of 4096 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Expected: the weights are published (github.com/sail-sg/metaformer), but neither
their accuracy nor the hyper-parameters.
Recipe: `recipes.metaformer_in21k`, which says what stands in for them.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.metaformer_in21k("caformer_b36_in21k")
