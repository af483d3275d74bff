"""The table of preflights in docs/benchmarks.md agrees with docs/preflight/.

`python tests/preflight/test_verdicts.py` prints the rows.
"""

import json
import pathlib

import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"
FILES = sorted((DOCS / "preflight").glob("*.json"))
GIB = 2**30

# The preflights that the page must have.
NAMES = {
    ("poolformer_s12", "v5litepod-8"), ("poolformer_s24", "v5litepod-8"),
    ("poolformer_m36", "v5litepod-8"), ("caformer_s18", "v5litepod-8"),
    ("convformer_s18", "v5litepod-8"), ("poolformer_s24", "v5litepod-256"),
    ("poolformer_s24", "v4-32"), ("poolformer_s24", "v5p-8"),
    ("poolformer_s24", "v6e-8"), ("poolformer_s12", "v5p-8")}


def row(report):
  """A report of `tools.preflight --json` as a row of the table."""
  memory = report["memory"]
  cells = [
      report["model"], report["topology"]["name"],
      f"{report['images_at_once']}" + (
          f" x {report['accumulate']}" if report["accumulate"] > 1 else ""),
      "fits" if report["fits"] else "does not fit",
      f"{memory['needed'] / GIB:.2f} of {memory['available'] / GIB:.2f}",
      f"{report['flops_per_image'] / 1e9:.1f}"]
  if report["fits"]:
    bound = report["bound"]
    sent = sum(c["count"] * c["n_bytes"] for c in report["collectives"]
               if c["kind"] != "collective-permute")
    cells += [f"{report['bytes_per_image'] / 1e6:.0f}",
              f"{bound['images_per_second_per_chip']:,.0f} ({bound['by']})",
              f"{sent / 1e6:.1f}", f"{bound['hours']:.2g}"]
  else:
    cells += [""] * 4
  return "| " + " | ".join([*cells, f"{report['compile_seconds']:.0f}"]) + " |"


def load(path):
  return json.loads(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_page_has_the_row(path):
  assert row(load(path)) in (DOCS / "benchmarks.md").read_text().splitlines()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_fits_needs_at_most_the_available_memory(path):
  report = load(path)
  limit = report["memory"]["available"]
  assert report["fits"] == (report["memory"]["needed"] <= limit)
  for found in report.get("search", {}).get("tried", {}).values():
    assert found["fits"] == (found["needed"] <= limit)


def test_no_preflight_is_missing():
  reports = [load(path) for path in FILES]
  assert {(r["model"], r["topology"]["name"]) for r in reports} >= NAMES
  # Each search ends with a batch that fits, and a larger one that does not.
  searches = [r["search"] for r in reports if "search" in r]
  assert searches
  for search in searches:
    tried = {int(n): c["fits"] for n, c in search["tried"].items()}
    assert max(n for n, fits in tried.items() if fits) == (
        search["largest_images_at_once"])
    assert min(n for n, fits in tried.items() if not fits) == (
        search["largest_images_at_once"] + 128)


if __name__ == "__main__":
  print("\n".join(row(load(path)) for path in FILES))
