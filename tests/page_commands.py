"""Commands of pages: taken apart, and parsed as their tools parse them.

As a program, it reads [[folder, module, flags], ...] and prints what is wrong
with each, parsed in a fork of its own.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator

import pages

# The console commands, and their modules.
CONSOLE = dict(re.findall(r'(metaformer-[\w-]+) = "?\s*"?([\w.]+):',
                          (pages.ROOT / "setup.py").read_text()))
# Of the shell, and of other projects or machines: not run here.
OTHERS = {".", "[", "apt-get", "cd", "cp", "docker", "eval", "gcloud", "git",
          "kubectl", "ls", "mkdir", "ruff", "sbatch", "sky", "ssh-add",
          "ssh-keygen", "tensorboard", "unzip", "wandb", "xpk"}


def split(block: pages.Block) -> list[list[str]]:
  """The commands of a block of bash, with its variables filled in."""
  variables, found = {}, []
  for line in block.text.replace("\\\n", " ").splitlines():
    for name, value in variables.items():
      line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words = [[]]
    for word in lexer:
      if set(word) <= set(";&|"):
        words.append([])
      else:
        words[-1].append(word)
    for command in filter(None, words):
      if match := re.fullmatch(r"(\w+)=(.*)", command[0]):
        variables[match[1]] = match[2]
        command = command[1:]
      found += [command] if command else []
  return found


def parts(command: list[str]) -> Iterator[tuple[str, list[str]]]:
  """The modules of this package that a command starts, and their flags.

  Raises:
    AssertionError: the command is none that is known, or names a file that is
      not in the repository, or a flag that the file does not have.
  """
  program, *rest = command
  if program in CONSOLE:
    yield CONSOLE[program], rest
  elif re.fullmatch(r"python[\d.]*", program) and rest[0] == "-m":
    if rest[1].startswith("metaformer_jax."):
      yield rest[1], rest[2:]
    else:
      assert rest[1] in ("pip", "pytest", "sphinx", "venv"), command
  elif program == "python" and rest[0] == "-c":
    compile(rest[1], "-c", "exec")
  elif program == "python":
    yield from _script(rest)
  elif program == "pip":
    _check_extras(rest)
  elif program == "pytest":
    for word in rest:
      assert "/" not in word or (pages.ROOT / word.split("::")[0]).exists(), (
          word)
  else:
    assert program in OTHERS, f"{program}: mark the block as not run, with why"


def _script(words: list[str]) -> Iterator[tuple[str, list[str]]]:
  path = pages.ROOT / words[0]
  assert path.is_file(), words[0]
  own, run = words[1:], []
  if "--" in own:
    own, run = own[:own.index("--")], own[own.index("--") + 1:]
  code = "".join(p.read_text() for p in path.parent.glob("*.py")) if (
      path.parent.name == "launch") else path.read_text()
  for word in own:
    flag = word.split("=")[0]
    assert not flag.startswith("--") or flag in code, f"{words[0]}: {flag}"
  if any(word.startswith("--config") for word in run):
    yield "metaformer_jax.main", run


def _check_extras(words: list[str]) -> None:
  declared = (pages.ROOT / "setup.py").read_text()
  for word in words:
    if match := re.fullmatch(r"(?:\.|metaformer-jax)\[(.*)\]", word):
      for extra in match[1].split(","):
        assert f'"{extra}": ' in declared, f"no such extra: {extra}"


def problems(work: list[tuple[str, str, list[str]]]) -> list[str]:
  """What is wrong with each (folder, module, flags); "" if nothing is."""
  import command_line  # noqa: PLC0415  Which is not needed by the server.

  done = command_line.python([__file__], input=json.dumps(work))
  assert not done.returncode, done.stderr
  return json.loads(done.stdout)


def _parse(module: str, arguments: list[str]) -> None:
  """Parses a command line as its tool does, without what needs its data."""
  from metaformer_jax import cli  # noqa: PLC0415

  sys.argv = [module, *map(_at_hand, arguments)]
  tool = importlib.import_module(module)
  if hasattr(tool, "parse"):
    found = tool.parse()
    args, rest = found if isinstance(found, tuple) else (found, None)
    if module.endswith(".study"):
      _check_study(args)
    if not rest:
      return
    sys.argv = [module, *rest]
  cli.parse(elsewhere=True, module=module, train=False,
            otherwise=_experiment)


def _experiment():
  """Instead of those that a workdir or a file of weights has."""
  from metaformer_jax import cli  # noqa: PLC0415
  from metaformer_jax.config import resolve, typed  # noqa: PLC0415

  sources = cli.given("config.data.source")
  config = typed.default("detection" if "coco" in sources
                         else "classification")
  config.data.source = "scenes" if "coco" in sources else "digits"
  config.model.name = "poolformer_s12"
  return resolve.resolve(config, files=False)


def _at_hand(word: str) -> str:
  """An argument, with something that is here for what a user has."""
  from metaformer_jax.config import typed  # noqa: PLC0415

  key, _, value = word.partition("=")
  if value == "SEED":
    return f"{key}=0"
  if value.startswith("gs://BUCKET"):
    return word.replace("gs://", "")
  if key == "--config.init" and "/" in value:  # A run, or a file.
    return f"{key}=caformer_s18"
  if key == "--config_json":
    path = pathlib.Path("experiment.json")
    path.write_text(typed.to_json(_experiment()))
    return f"{key}={path}"
  return word


class _CheckedError(Exception):
  """A study's experiments are valid, and the first would begin."""


def _check_study(args) -> None:
  """All experiments of a study; their data need not be here."""
  from metaformer_jax import cli  # noqa: PLC0415
  from metaformer_jax.tools import study  # noqa: PLC0415

  def begin(*_):
    raise _CheckedError

  cli.resolve = functools.partial(cli.resolve, files=False)
  study._train = begin
  with contextlib.suppress(_CheckedError):
    study.main(args)


def _serve() -> None:
  for name in ("cli", "data.sources", "tools.benchmark", "tools.cam",
               "tools.predict", "tools.study"):  # Once for all.
    importlib.import_module(f"metaformer_jax.{name}")
  results = []
  for folder, module, arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out:
      pid = os.fork()
      if not pid:
        os.chdir(folder)
        message = ""
        with (contextlib.redirect_stderr(io.StringIO()),
              contextlib.redirect_stdout(io.StringIO())):
          try:
            _parse(module, arguments)
          except BaseException as e:
            message = f"{type(e).__name__}: {e}"
        os.write(out.fileno(), message.encode())
        os._exit(0)
      os.waitpid(pid, 0)
      out.seek(0)
      results.append(out.read().decode())
  json.dump(results, sys.stdout)


if __name__ == "__main__":
  _serve()
