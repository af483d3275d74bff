"""CAFormer-S36 fine-tuned on ImageNet-1K at 384x384.

    python -m metaformer_jax.main --config=configs/caformer_s36_384.py \
        --config.data.path=/path/to/imagenet \
        --config.init=/path/to/caformer_s36.pth

Hardware: the batch of 1024 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Expected: 85.7% top-1, published (github.com/sail-sg/metaformer, README),
from the weights of configs/caformer_s36.py; not trained here.
Recipe: `recipes.metaformer_finetune`, of scripts/caformer/
finetune_caformer_s36_384.sh there.
That script names caformer_s18_384; its settings are meant for this model.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.metaformer_finetune(
      "caformer_s36_384", init="caformer_s36.pth",
      drop_path_rate=0.5, head_drop_rate=0.4)
