"""RandFormer-S36 on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/randformer_s36.py \
        --config.data.path=/path/to/imagenet

Hardware: the batch of 4096 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Expected: 79.5% top-1, published (github.com/sail-sg/metaformer, README);
not trained here.
Recipe: `recipes.metaformer_baseline`, of scripts/randformer/
train_randformer_s36.sh there.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.metaformer_baseline("randformer_s36", drop_path_rate=0.2)
