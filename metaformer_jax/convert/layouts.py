"""PyTorch tensors <-> Flax variables, by the rules of `rules`.

Flat names on our side are "params/stage1/block1/norm1/scale": the collection,
then the module's path.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from metaformer_jax import errors
from metaformer_jax.convert import rules

Tensors = Mapping[str, np.ndarray]
# Of an array of the flat name, another that fits the shape; None leaves it out.
Adapt = Callable[[str, np.ndarray, tuple[int, ...]], np.ndarray | None]


class Laying(NamedTuple):
  """How a leaf lies in PyTorch; both directions are inverse to each other."""

  to_flax: Callable[[np.ndarray], np.ndarray]
  to_torch: Callable[[np.ndarray], np.ndarray]


def _matrix(x: np.ndarray) -> np.ndarray:
  """[out, in], also where it is a 1 x 1 convolution, -> [in, out]."""
  return x.reshape(x.shape[:2]).T if x.shape[2:] == (1, 1) else x.T


LAYINGS: dict[str, Laying] = {
    "same": Laying(lambda x: x, lambda x: x),
    "oihw": Laying(lambda x: x.transpose(2, 3, 1, 0),
                   lambda x: x.transpose(3, 2, 0, 1)),
    "oi": Laying(_matrix, lambda x: x.T),
    "oi11": Laying(_matrix, lambda x: x.T[:, :, None, None]),
    "1chw": Laying(lambda x: x.squeeze(0).transpose(1, 2, 0),
                   lambda x: x.transpose(2, 0, 1)[None]),
    "11c": Laying(lambda x: x.reshape(-1), lambda x: x[None, None]),
    "count": Laying(lambda x: x.astype(np.int32), lambda x: x.astype(np.int64)),
}


class Entry(NamedTuple):
  """Where one of our leaves is in a layout."""

  key: str
  laying: str


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
  """{"params": {"norm": {"scale": x}}} -> {"params/norm/scale": x}."""
  return traverse_util.flatten_dict(variables, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Inverse of `flatten`."""
  return traverse_util.unflatten_dict(flat, sep="/")


def entries(family: str, layout: str, names: Iterable[str]) -> dict[str, Entry]:
  """Where the layout has each of our flat names; without those it has not."""
  paths = {name: name.partition("/")[2] for name in names}
  embedded = _stages_with("pos_embed", paths.values())
  attention = _stages_with(r"block1/token_mixer/qkv", paths.values())
  found = {}
  for rule in rules.RULES[family][layout]:
    leaves = rules.KINDS.get(rule.kind)
    for ours, theirs, laying in leaves or ((None, None, rule.kind),):
      template = rule.path if ours is None else f"{rule.path}/{ours}"
      pattern = re.compile(re.sub(r"{(\w)}", r"(?P<\1>\\d+)", template))
      key = rule.key if theirs is None else f"{rule.key}.{theirs}"
      for name, path in paths.items():
        match = pattern.fullmatch(path)
        if not match or name in found:
          continue
        numbers = {k: int(v) for k, v in match.groupdict().items()}
        is_attention = numbers.get("s") in attention
        if rule.where == ("other" if is_attention else "attention"):
          continue
        found[name] = Entry(
            key.format(**_derived(numbers, embedded)), laying)
  return found


def _stages_with(what: str, paths: Iterable[str]) -> set[int]:
  matches = (re.match(rf"stage(\d+)/{what}\b", path) for path in paths)
  return {int(match[1]) for match in matches if match}


def _derived(numbers: dict[str, int], embedded: set[int]) -> dict[str, int]:
  """What a key may use: s, b, i as they are, and from 0 as s0 and b0.

  In the official PoolFormer's list `network` stage s has its position
  embedding at `embed`, if it has one, its blocks at `blocks`, and the
  downsampling before it at `down`.
  """
  derived = dict(numbers)
  if "b" in numbers:
    derived["b0"] = numbers["b"] - 1
  if "s" in numbers:
    s = numbers["s"]
    before = sum(stage < s for stage in embedded)
    derived |= {"s0": s - 1, "down": 2 * s - 3 + before,
                "embed": 2 * s - 2 + before,
                "blocks": 2 * s - 2 + before + (s in embedded)}
  return derived


def recognize(family: str, keys: Iterable[str], names: Iterable[str]) -> str:
  """The layout that has most of the keys; "flax" for our own flat names.

  Raises:
    WeightsError: none has any.
  """
  keys, names = set(keys), list(names)
  shared = {"flax": len(keys.intersection(names))}
  for layout in rules.RULES[family]:
    theirs = {e.key for e in entries(family, layout, names).values()}
    shared[layout] = len(keys & theirs)
  best = max(shared, key=shared.get)
  if not shared[best]:
    shown = ", ".join(sorted(keys)[:3])
    raise errors.WeightsError(
        f"no tensor has a name of this model's; the layouts known for it are "
        f"{', '.join(sorted(shared))}, the file has {shown}, ...")
  return best


def to_flax(family: str, tensors: Tensors, target: Mapping[str, Any],
            adapt: Adapt = lambda name, value, shape: value, *,
            unwanted: Collection[str] = ()) -> dict[str, Any]:
  """Converts a whole model; each tensor is used once, each target filled.

  Args:
    family: `ModelSpec.family`.
    tensors: by the names of any layout of the family.
    target: variables of the model, or their shapes and dtypes.
    adapt: called with every flat name, converted array and the shape that the
      target has. What it leaves out is absent in the result.
    unwanted: flat names of the target that the tensors may have, but the result
      has not.

  Returns:
    Variables of numpy arrays.

  Raises:
    WeightsError: one line that lists every tensor that is missing, has no
      place or is of another shape or type.
  """
  target = flatten(target)
  layout = recognize(family, tensors, target)
  if layout == "flax":
    where = {name: Entry(name, "same") for name in target}
  else:
    where = entries(family, layout, target)
  lacking = target.keys() - where
  if lacking:
    raise errors.WeightsError(
        f"the {layout} layout has no place for {', '.join(sorted(lacking))}")
  used = {entry.key for entry in where.values()}
  unused = [f"{key} has no place" for key in sorted(tensors.keys() - used)]
  problems, made = [], {}
  for name, want in target.items():
    key, laying = where[name]
    if name in unwanted:
      continue
    if key not in tensors:
      if laying == "count":  # Files of before PyTorch 0.4.1.
        made[name] = np.zeros(want.shape, want.dtype)
      else:
        problems.append(f"{key} is missing")
      continue
    tensor, laying = tensors[key], LAYINGS[laying]
    if tensor.dtype.kind != np.dtype(want.dtype).kind:
      problems.append(f"{key} is {tensor.dtype}, not {np.dtype(want.dtype)}")
      continue
    try:
      value = adapt(name, laying.to_flax(tensor), want.shape)
      fits = value is None or value.shape == want.shape
    except ValueError:  # Of another rank than the laying is for.
      fits = False
    if not fits:
      need = laying.to_torch(_placeholder(want)).shape
      problems.append(f"{key} is {list(tensor.shape)}, not {list(need)}")
    elif value is not None:
      made[name] = np.asarray(value, want.dtype, order="C")
  if problems or unused:
    raise errors.WeightsError(
        f"in the {layout} layout, {len(problems) + len(unused)} tensors do not "
        f"fit the model: {'; '.join(problems + unused)}")
  return unflatten(made)


def check_layout(family: str, layout: str) -> None:
  """Raises WeightsError if the family's weights have no such layout."""
  known = [*rules.RULES[family], "flax"]
  if layout not in known:
    raise errors.WeightsError(
        f"layout {layout!r} is not known for this model"
        f"{errors.did_you_mean(layout, known)}")


def to_torch(family: str, variables: Mapping[str, Any], layout: str,
             ) -> dict[str, np.ndarray]:
  """Inverse of `to_flax`: tensors by the names of a layout.

  Raises:
    WeightsError: the family has no such layout, or the layout no place for
      some of the variables.
  """
  flat = flatten(variables)
  if layout == "flax":
    return {name: np.asarray(value) for name, value in flat.items()}
  check_layout(family, layout)
  where = entries(family, layout, flat)
  lacking = flat.keys() - where
  if lacking:
    raise errors.WeightsError(
        f"the {layout} layout has no place for {', '.join(sorted(lacking))}")
  return {
      where[name].key: np.asarray(
          LAYINGS[where[name].laying].to_torch(np.asarray(value)), order="C")
      for name, value in flat.items()}


def _placeholder(like) -> np.ndarray:
  """An array of the shape that takes no memory."""
  return np.broadcast_to(np.zeros((), like.dtype), like.shape)
