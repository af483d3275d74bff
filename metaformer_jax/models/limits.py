"""Checks that families share: each yields lines "key: reason; nearest: value".

`settings` uses them. No jax.
"""

from collections.abc import Iterator, Sequence

# Limits of any run; a larger model would run out of memory.
_MAX_BLOCKS = 10_000
_MAX_PARAMETERS = 10**11


def check_stages(**of_stages: Sequence) -> Iterator[str]:
  """Checks tuples, `depths` among them, that have one value for each stage."""
  lengths = {key: len(values) for key, values in of_stages.items()}
  if len(set(lengths.values())) > 1 or 0 in lengths.values():
    n = lengths.pop("depths")
    rest = ", ".join(f"{key} has {m}" for key, m in lengths.items())
    yield (f"depths: has {n} stage{'' if n == 1 else 's'}, {rest}; give each "
           "the same number")


def check_heads(key: str, dim: int, n_heads: int) -> Iterator[str]:
  """Checks that the heads divide the channels."""
  if dim % n_heads:
    nearest = max(n_heads, (dim + n_heads // 2) // n_heads * n_heads)
    yield (f"{key}: {dim} channels are not divisible by {n_heads} heads; "
           f"nearest: {nearest}")


def check_mlp(key: str, ratio: float, dim: int) -> Iterator[str]:
  """Checks that an MLP has a hidden channel."""
  if int(ratio * dim) < 1:
    yield (f"{key}: {ratio} gives an MLP without channels; least: {1 / dim}")


def check_total(depths: Sequence[int], params: dict[str, float], lower: str,
                depth_key: str = "depths") -> Iterator[str]:
  """Checks the number of blocks and a lower bound on that of parameters.

  Args:
    depths: blocks of each stage.
    params: {hyper-parameter: the parameters that grow with it}.
    lower: hyper-parameters to lower, besides num_classes.
    depth_key: the hyper-parameter of `depths`.
  """
  if sum(depths) > _MAX_BLOCKS:
    yield f"{depth_key}: {sum(depths)} blocks; the most are {_MAX_BLOCKS}"
  total = sum(params.values())
  if total > _MAX_PARAMETERS:
    yield (f"{max(params, key=params.get)}: the model has more than "
           f"{total:.1g} parameters; the most are {_MAX_PARAMETERS:.0e}; lower "
           f"{lower} or num_classes")
