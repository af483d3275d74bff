"""Prints the table of models as Markdown:

    python -m metaformer_jax.tools.summarize "caformer*"

Parameters and multiply-accumulates are those of the traced program; nothing is
computed. `--output=docs/models.md` writes the page that this project keeps.
"""

import argparse
import pathlib
from collections.abc import Iterator

from metaformer_jax import cli, errors
from metaformer_jax.models import cost, registry

_HEADER = """\
# Models

Written by `python -m metaformer_jax.tools.summarize --output=docs/models.md`. Parameters and GMACs (multiply-accumulates of one image, in 1e9) are counted on the traced program; GMACs in brackets and top-1 (ImageNet-1K, percent) are published, by the source named last.

"""  # noqa: E501

_COLUMNS = ("model", "parameters", "frozen", "GMACs", "input", "crop",
            "classes", "top-1", "source")


def rows(pattern: str) -> Iterator[str]:
  """The lines of the table for the models that match a shell pattern."""
  yield "| " + " | ".join(_COLUMNS) + " |"
  yield "|---" * len(_COLUMNS) + "|"
  specs = sorted(map(registry.get_spec, registry.list_models(pattern)),
                 key=lambda s: (s.name.partition("_")[0], s.n_params))
  counted = {}  # Names that share a network share its cost.
  for spec in specs:
    network = (spec.module, repr(spec.hparams), spec.num_classes,
               spec.input_size)
    if network not in counted:
      counted[network] = cost.of_model(registry.create_model(spec.name),
                                       spec.input_size)
    found = counted[network]
    published = "" if spec.gmacs is None else f" ({spec.gmacs:.1f})"
    yield "| " + " | ".join([
        spec.name, f"{found.n_params:,}", f"{found.n_frozen:,}",
        f"{found.macs / 1e9:.2f}{published}",
        f"{spec.input_size} x {spec.input_size}", f"{spec.crop_pct:g}",
        f"{spec.num_classes:,}",
        "" if spec.top1 is None else f"{spec.top1:.1f}", spec.source]) + " |"


def main(args: argparse.Namespace) -> None:
  """Prints or writes the table."""
  if not registry.list_models(args.pattern):
    raise errors.ConfigError(f"no model matches {args.pattern!r}"
                             "; see metaformer_jax.list_models()")
  table = "\n".join(rows(args.pattern))
  if args.output:
    pathlib.Path(args.output).write_text(f"{_HEADER}{table}\n")
  else:
    print(table)


def parse() -> argparse.Namespace:
  """The command line."""
  parser = cli.Parser(
      prog="python -m metaformer_jax.tools.summarize", description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("pattern", nargs="?", default="*",
                      help="shell pattern of names, all by default")
  parser.add_argument("--output", help="a file to write instead of printing")
  return parser.parse_args()


if __name__ == "__main__":
  with cli.one_line_errors():
    main(parse())
