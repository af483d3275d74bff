"""PoolFormer: the table of arXiv 2111.11418.

Sources: table 1 of the paper (MACs, top-1), the official code
(github.com/sail-sg/poolformer, models/poolformer.py: hyper-parameters,
evaluation crop); parameters counted from that code, 1000 classes.
"""

from metaformer_jax.models.spec import ModelSpec

_COMMON = {
    "token_mixers": ("pooling",) * 4,
    "pool_size": 3,
    "norm": "group_norm",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "mlp_ratio": 4.0,
    "in_patch_size": 7,
    "in_stride": 4,
    "in_pad": 2,
}

_S_DIMS = (64, 128, 320, 512)
_M_DIMS = (96, 192, 384, 768)

# depths, dims, LayerScale init, eval crop, parameters, GMACs, top-1
_ROWS = {
    "poolformer_s12":
        ((2, 2, 6, 2), _S_DIMS, 1e-5, 0.9, 11_915_176, 1.8, 77.2),
    "poolformer_s24":
        ((4, 4, 12, 4), _S_DIMS, 1e-5, 0.9, 21_388_968, 3.4, 80.3),
    "poolformer_s36":
        ((6, 6, 18, 6), _S_DIMS, 1e-6, 0.9, 30_862_760, 5.0, 81.4),
    "poolformer_m36":
        ((6, 6, 18, 6), _M_DIMS, 1e-6, 0.95, 56_172_520, 8.8, 82.1),
    "poolformer_m48":
        ((8, 8, 24, 8), _M_DIMS, 1e-6, 0.95, 73_473_448, 11.6, 82.5),
}


def _spec(name, depths, dims, layer_scale_init, crop_pct, n_params, gmacs,
          top1):
  return ModelSpec(
      name=name,
      module="metaformer_jax.models.metaformer:MetaFormer",
      hparams=dict(_COMMON, depths=depths, dims=dims,
                   layer_scale_init=layer_scale_init),
      n_params=n_params, gmacs=gmacs, top1=top1, crop_pct=crop_pct,
      source="arXiv 2111.11418, table 1")


MODELS = {name: _spec(name, *row) for name, row in _ROWS.items()}
