"""Parameters that are not trained: `config.train.freeze`.

A module of which all parameters are frozen runs in evaluation mode. Its
parameters get no gradient, no update, no decay and no optimizer state.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flax import linen as nn
from flax import traverse_util

from metaformer_jax import errors
from metaformer_jax.config import globs
from metaformer_jax.tasks import base
from metaformer_jax.training import backbone

# Arguments of modules that choose between training and evaluation, at their
# value in evaluation.
_EVALUATION = {"train": False, "deterministic": True,
               "use_running_average": True}


@dataclasses.dataclass(frozen=True)
class Frozen:
  """What is frozen.

  Attributes:
    params: paths of parameters, as "stage1/block1/norm1/scale".
    modules: paths of the modules of which all parameters are frozen.
  """

  params: frozenset[str] = frozenset()
  modules: frozenset[str] = frozenset()

  def __contains__(self, path: str) -> bool:
    """Whether a parameter, or a variable of a module, is frozen."""
    if path in self.params:
      return True
    parts = path.split("/")
    return any("/".join(parts[:i]) in self.modules for i in range(len(parts)))

  def split(self, tree: Mapping[str, Any]) -> tuple[Any, Any]:
    """Divides a tree of parameters into the trained and the frozen ones."""
    if not self.params:
      return tree, {}
    flat = traverse_util.flatten_dict(tree, sep="/")
    return tuple(traverse_util.unflatten_dict(
        {path: v for path, v in flat.items() if (path in self) == frozen},
        sep="/") for frozen in (False, True))

  def split_state(self, state: Mapping[str, Any]) -> tuple[Any, Any]:
    """As `split`, for {collection: variables}."""
    parts = {name: self.split(tree) for name, tree in state.items()}
    return tuple({name: part[i] for name, part in parts.items()}
                 for i in range(2))

  @contextlib.contextmanager
  def in_evaluation_mode(self) -> Iterator[None]:
    """Within it, frozen modules run as in evaluation; for tracing a step."""

    def call(next_fn, args, kwargs, context):
      if "/".join(context.module.path) not in self.modules:
        return next_fn(*args, **kwargs)
      signature = inspect.signature(
          getattr(type(context.module), context.method_name))
      bound = signature.bind(context.module, *args, **kwargs)
      bound.arguments |= {name: value for name, value in _EVALUATION.items()
                          if name in signature.parameters}
      return next_fn(*bound.args[1:], **bound.kwargs)

    if not self.modules:
      yield
      return
    with nn.intercept_methods(call):
      yield


NOTHING = Frozen()


def merge(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
  """Inverse of `Frozen.split`."""
  if not frozen:
    return trained
  return traverse_util.unflatten_dict(
      traverse_util.flatten_dict(trained, sep="/")
      | traverse_util.flatten_dict(frozen, sep="/"), sep="/")


def find(patterns: Sequence[str], params: Mapping[str, Any],
         part: base.Backbone | None) -> Frozen:
  """What `config.train.freeze` names.

  Args:
    patterns: of parameters' paths, as in `config.globs`. "backbone" stands for
      everything at the path of `part` but its head.
    params: the parameters, or their shapes.
    part: the backbone; None if there is none.

  Raises:
    ConfigError: a pattern matches nothing, or all is frozen.
  """
  if not patterns:
    return NOTHING
  names = sorted(traverse_util.flatten_dict(params, sep="/"))
  frozen = set()
  for pattern in patterns:
    frozen.update(
        (pattern == "backbone" and _in_backbone(names, part))
        or globs.matching(pattern, names, "config.train.freeze", ["backbone"]))
  if len(frozen) == len(names):
    raise errors.ConfigError(
        f"config.train.freeze: {', '.join(patterns)} freezes all "
        f"{len(names)} parameters; nothing is left to train")
  trained = _modules(name for name in names if name not in frozen)
  return Frozen(frozenset(frozen), frozenset(_modules(frozen) - trained))


def require_alike(frozen: Frozen, params: Mapping[str, Any]) -> None:
  """Checks that the blocks of each stage are frozen alike.

  Blocks that are scanned (`config.compile.scan`) run as the first of them does.

  Args:
    frozen: what is frozen.
    params: the parameters, or their shapes.

  Raises:
    ConfigError: a block has other frozen modules than the first of its stage.
  """
  modules = {}  # {path of a stage: {block: paths of its frozen modules}}
  for name in sorted(_modules(traverse_util.flatten_dict(params, sep="/"))):
    stage, _, rest = name.partition("/block")
    number, *inside = rest.split("/")
    if number.isdecimal():
      block = modules.setdefault(stage, {}).setdefault(int(number), set())
      if name in frozen.modules:
        block.add("/".join(inside))
  for stage, blocks in modules.items():
    for number, block in blocks.items():
      if block != blocks[min(blocks)]:
        raise errors.ConfigError(
            f"config.train.freeze: freezes other parts of {stage}/block{number}"
            f" than of {stage}/block{min(blocks)}, and config.compile.scan = "
            "True runs both as one; nearest: config.compile.scan = False")


def _in_backbone(names: Iterable[str], part: base.Backbone | None) -> list[str]:
  if part is None:
    return []
  relative = {name: backbone.relative_name(name, part.path) for name in names}
  return [name for name, inside in relative.items()
          if inside and inside.split("/")[0] not in ("head", "head_dist")]


def _modules(names: Iterable[str]) -> set[str]:
  """The paths of all modules that hold a parameter, or hold one that does."""
  return {name[:i] for name in names for i, c in enumerate(name) if c == "/"}
