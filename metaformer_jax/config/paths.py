"""Local paths that users give."""

import pathlib

from metaformer_jax import errors


def local(key: str, value: str | pathlib.Path,
          kind: type[errors.UserError] = errors.ConfigError) -> pathlib.Path:
  """A path with `~` expanded, of which a file system can be asked.

  Args:
    key: what the user set, for the message; may be empty.
    value: the path; it need not exist.
    kind: of the error.

  Raises:
    kind: the path is too long, its user is unknown, or access is denied.
  """
  try:
    path = pathlib.Path(value).expanduser()
    path.exists()
  except (OSError, RuntimeError, ValueError) as e:
    raise kind(f"{key}: {value}: {e}" if key else f"{value}: {e}") from e
  return path


def existing_parent(path: pathlib.Path) -> pathlib.Path:
  """The path itself or its nearest parent that exists."""
  path = path.absolute()
  while not path.exists():
    path = path.parent
  return path
