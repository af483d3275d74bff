"""ConvFormer-M36 fine-tuned on ImageNet-1K at 384x384.

    python -m metaformer_jax.main --config=configs/convformer_m36_384.py \
        --config.data.path=/path/to/imagenet \
        --config.init=/path/to/convformer_m36.pth

Hardware: the batch of 1024 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Expected: 85.6% top-1, published (github.com/sail-sg/metaformer, README),
from the weights of configs/convformer_m36.py; not trained here.
Recipe: `recipes.metaformer_finetune`, of scripts/convformer/
finetune_convformer_m36_384.sh there.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.metaformer_finetune(
      "convformer_m36_384", init="convformer_m36.pth",
      drop_path_rate=0.8, head_drop_rate=0.5)
