"""The models of arXiv 2210.13452, "MetaFormer Baselines for Vision".

IdentityFormer, RandFormer, PoolFormerV2, ConvFormer, CAFormer. Source of
hyper-parameters, MACs and top-1: github.com/sail-sg/metaformer (README and
metaformer_baselines.py); parameters counted from that code.
"""

from metaformer_jax.models import poolformer, settings
from metaformer_jax.models.spec import ModelSpec

# Where these models differ from PoolFormer.
_COMMON = {
    "conv_kernel_size": 7,
    "attention_proj_bias": False,
    "norm_eps": 1e-6,
    "norm_bias": False,
    "activation": "star_relu",
    "mlp_bias": False,
    "layer_scale_init": 0.0,
    "res_scale_init": (0.0, 0.0, 1.0, 1.0),
    "downsample_norm": True,
    "conv_init": "trunc_normal",
    "head_norm_first": False,
}

# Parameters; the three basic families have equally many.
_BASIC_PARAMS = {"s12": 11_891_712, "s24": 21_341_464, "s36": 30_791_216,
                 "m36": 56_077_168, "m48": 73_346_056}

# family: mixers; for each size GMACs and top-1
_BASIC = {
    "identityformer": (("identity",) * 4, {
        "s12": (1.8, 74.6), "s24": (3.4, 78.2), "s36": (5.0, 79.3),
        "m36": (8.8, 80.0), "m48": (11.5, 80.4)}),
    "randformer": (("identity", "identity", "random", "random"), {
        "s12": (1.9, 76.6), "s24": (3.5, 78.2), "s36": (5.2, 79.5),
        "m36": (9.0, 81.2), "m48": (11.9, 81.4)}),
    "poolformerv2": (("pooling",) * 4, {
        "s12": (1.8, 78.0), "s24": (3.4, 80.7), "s36": (5.0, 81.6),
        "m36": (8.8, 82.2), "m48": (11.5, 82.6)}),
}

_SEP_CONV = {
    "s18": {"depths": (3, 3, 9, 3), "dims": (64, 128, 320, 512)},
    "s36": {"depths": (3, 12, 18, 3), "dims": (64, 128, 320, 512)},
    "m36": {"depths": (3, 12, 18, 3), "dims": (96, 192, 384, 576)},
    "b36": {"depths": (3, 12, 18, 3), "dims": (128, 256, 512, 768)},
}

# family: mixers; for each size the parameters with 1000 and 21,841 classes,
# GMACs at 224 and 384, and top-1 trained on 1k at 224 and 384, on 21k at 224
# and 384.
_MLP_HEAD = {
    "convformer": (("sepconv",) * 4, {
        "s18": (26_774_448, 69_477_657, 3.9, 11.6, 83.0, 84.4, 83.7, 85.0),
        "s36": (40_012_152, 82_715_361, 7.6, 22.4, 84.1, 85.4, 85.4, 86.4),
        "m36": (57_051_640, 105_090_145, 12.8, 37.7, 84.5, 85.6, 86.1, 86.9),
        "b36": (99_882_616, 163_927_009, 22.6, 66.5, 84.8, 85.7, 87.0, 87.6)}),
    "caformer": (("sepconv", "sepconv", "attention", "attention"), {
        "s18": (26_341_656, 69_044_865, 4.1, 13.4, 83.6, 85.0, 84.1, 85.4),
        "s36": (39_297_102, 82_000_311, 8.0, 26.0, 84.5, 85.7, 85.8, 86.9),
        "m36": (56_204_878, 104_243_383, 13.2, 42.0, 85.2, 86.2, 86.6, 87.5),
        "b36": (98_753_614, 162_798_007, 23.2, 72.2, 85.5, 86.4, 87.4, 88.1)}),
}


def _spec(family, size, suffix="", **fields):
  name = f"{family}_{size}{suffix}"
  return ModelSpec(
      name=name, family="metaformer_baselines",
      module="metaformer_jax.models.metaformer:MetaFormer", crop_pct=1.0,
      source="github.com/sail-sg/metaformer, README",
      checkpoint="https://huggingface.co/sail/dl/resolve/main/"
      f"{family}/{name}.pth", **fields)


def _basic():
  for family, (token_mixers, rows) in _BASIC.items():
    for size, (gmacs, top1) in rows.items():
      depths = poolformer.SIZES[size]["depths"]
      yield _spec(
          family, size, gmacs=gmacs, top1=top1, n_params=_BASIC_PARAMS[size],
          # A matrix per block over the 14 x 14 and 7 x 7 pixels of a 224 image.
          n_frozen=(depths[2] * 14**4 + depths[3] * 7**4
                    if "random" in token_mixers else 0),
          settings=settings.MetaFormer(
              **_COMMON, **poolformer.SIZES[size], token_mixers=token_mixers))


def _mlp_head():
  for family, (token_mixers, rows) in _MLP_HEAD.items():
    for size, (n_1k, n_21k, gmacs, gmacs_384, *top1) in rows.items():
      model = settings.MetaFormer(
          **_COMMON, **_SEP_CONV[size], token_mixers=token_mixers,
          norm="layer_norm", head="mlp")
      for suffix, image_size, published in zip(
          ("", "_384", "_in21ft1k", "_384_in21ft1k"), (224, 384) * 2, top1):
        yield _spec(family, size, suffix, settings=model, n_params=n_1k,
                    gmacs=gmacs if image_size == 224 else gmacs_384,
                    top1=published, input_size=image_size)
      yield _spec(family, size, "_in21k", settings=model, n_params=n_21k,
                  gmacs=None, top1=None, num_classes=21_841)


MODELS = {spec.name: spec for spec in [*_basic(), *_mlp_head()]}
