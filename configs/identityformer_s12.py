"""IdentityFormer-S12 on ImageNet-1K.

    python -m metaformer_jax.main --config=configs/identityformer_s12.py \
        --config.data.path=/path/to/imagenet

Hardware: the batch of 4096 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Expected: 74.6% top-1, published (github.com/sail-sg/metaformer, README);
not trained here.
Recipe: `recipes.metaformer_baseline`, of scripts/identityformer/
train_identityformer_s12.sh there.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.metaformer_baseline("identityformer_s12", drop_path_rate=0.1)
