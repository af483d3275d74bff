r"""ConvFormer (arXiv 2210.13452): ImageNet-1K, ImageNet-21K and fine-tuning.

    python -m metaformer_jax.main --config=configs/convformer.py:s18 \
        --config.data.path=/path/to/imagenet

Settings: scripts/convformer/ of github.com/sail-sg/metaformer. Variants with
initial weights download the published ones; `--config.init` names others. From
the head of ImageNet-21K, `*_in21ft1k` take the classes of ImageNet-1K.
"""

from metaformer_jax import recipes
from metaformer_jax.recipes import classification

# Recipe, drop path, dropout of the head, initial weights, published top-1.
VARIANTS = {
    "s18": ("imagenet", 0.2, 0.0, None, 83.0),
    "s18_384": ("finetune", 0.3, 0.4, "convformer_s18", 84.4),
    "s18_in21k": ("in21k", 0.1, 0.0, None, None),
    "s18_in21ft1k": ("finetune", 0.3, 0.4, "convformer_s18_in21k", 83.7),
    "s18_384_in21ft1k": ("finetune", 0.3, 0.4, "convformer_s18_in21k", 85.0),
    "s36": ("imagenet", 0.3, 0.0, None, 84.1),
    "s36_384": ("finetune", 0.5, 0.4, "convformer_s36", 85.4),
    "s36_in21k": ("in21k", 0.1, 0.0, None, None),
    "s36_in21ft1k": ("finetune", 0.5, 0.4, "convformer_s36_in21k", 85.4),
    "s36_384_in21ft1k": ("finetune", 0.5, 0.4, "convformer_s36_in21k", 86.4),
    "m36": ("imagenet", 0.4, 0.0, None, 84.5),
    "m36_384": ("finetune", 0.8, 0.5, "convformer_m36", 85.6),
    "m36_in21k": ("in21k", 0.1, 0.0, None, None),
    "m36_in21ft1k": ("finetune", 0.8, 0.5, "convformer_m36_in21k", 86.1),
    "m36_384_in21ft1k": ("finetune", 0.8, 0.5, "convformer_m36_in21k", 86.9),
    "b36": ("imagenet", 0.6, 0.0, None, 84.8),
    "b36_384": ("finetune", 0.8, 0.5, "convformer_b36", 85.7),
    "b36_in21k": ("in21k", 0.1, 0.0, None, None),
    "b36_in21ft1k": ("finetune", 0.8, 0.5, "convformer_b36_in21k", 87.0),
    "b36_384_in21ft1k": ("finetune", 0.8, 0.5, "convformer_b36_in21k", 87.6),
}

NOTES = {
    "*_in21k": "accuracy and hyper-parameters are not published; this is the "
               "recipe of ImageNet-1K with 90 epochs and drop path 0.1",
    "*_in21ft1k": "hyper-parameters are not published; this is the recipe of "
                  "the fine-tuning from ImageNet-1K at 384x384",
}


def get_config(variant=None):
  recipe, drop_path, head_drop, init, _ = recipes.variant(VARIANTS, variant)
  name = f"convformer_{variant}"
  rates = {"drop_path_rate": drop_path, "head_drop_rate": head_drop}
  if recipe == "finetune":
    return classification.metaformer_finetune(
        name, init=init, **rates, base_lr=5e-5)
  if recipe == "in21k":
    return classification.metaformer_in21k(name, **rates)
  return classification.metaformer_baseline(name, **rates, warmup_epochs=20.0)
