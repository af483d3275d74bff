"""PoolFormerV2-S24 on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/poolformerv2_s24.py \
        --config.data.path=/path/to/imagenet

Hardware: the batch of 4096 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Expected: 80.7% top-1, published (github.com/sail-sg/metaformer, README);
not trained here.
Recipe: `recipes.metaformer_baseline`, of scripts/poolformerv2/
train_poolformerv2_s24.sh there.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.metaformer_baseline("poolformerv2_s24", drop_path_rate=0.1)
