"""ConvFormer-B36, trained on ImageNet-21K, fine-tuned on 1K at 384x384.

    python -m metaformer_jax.main \
        --config=configs/convformer_b36_384_in21ft1k.py \
        --config.data.path=/path/to/imagenet \
        --config.init=convformer_b36_from_21k.safetensors

Hardware: the batch of 1024 is meant for a TPU pod slice or several GPUs;
`--config.train.accumulate=8` fits it on fewer.
Its weights begin as those of ImageNet-21K, with the head's 1000 classes:
`python -m metaformer_jax.tools.convert --model=convformer_b36 --head_21k
--input=convformer_b36_in21k.pth --output=convformer_b36_from_21k.safetensors`.
Expected: 87.6% top-1, published (github.com/sail-sg/metaformer, README);
not trained here.
Recipe: `recipes.metaformer_finetune`: that of the 1K models at 384x384, as
the repository has none for this run.
"""

from metaformer_jax.recipes import classification as recipes


def get_config():
  return recipes.metaformer_finetune(
      "convformer_b36_384_in21ft1k", init="convformer_b36_from_21k.safetensors",
      drop_path_rate=0.8, head_drop_rate=0.5)
