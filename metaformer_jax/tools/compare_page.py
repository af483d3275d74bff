"""The page of a comparison: one HTML file that needs nothing else.

Every text that comes from a run is escaped. Pictures are data URIs, and the
page's policy forbids scripts and connections.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

from metaformer_jax import errors
from metaformer_jax.tools import compare, compare_plot

_STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1b1f24;
       background: #fff; max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.7rem;
         border-bottom: 1px solid #d8dee4; overflow-wrap: anywhere;
         min-width: 5.5rem; max-width: 20rem; }
th:first-child { position: sticky; left: 0; background: #fff;
                 font-weight: normal; color: #57606a; }
td { font-variant-numeric: tabular-nums; }
td.best { font-weight: bold; }
.swatch { display: inline-block; width: 0.8em; height: 0.8em;
          border-radius: 50%; margin-right: 0.35em; }
.curves { display: grid; gap: 0.5rem; margin-top: 1.5rem;
          grid-template-columns: repeat(auto-fill,
          minmax(min(100%, 22rem), 1fr)); }
.curves img { width: 100%; height: auto; }
small { color: #57606a; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(runs: Sequence[compare.Run], differences: Mapping[str, Sequence[str]],
         panels: Sequence[compare_plot.Panel]) -> str:
  """The page.

  Args:
    runs: what is compared.
    differences: of their configs, as `compare.differences` returns them.
    panels: of the curves.
  """
  title = f"{len(runs)} runs compared" if len(runs) > 1 else runs[0].name
  body = []
  tasks = list(dict.fromkeys(run.cfg.task.name for run in runs))
  for task in tasks:
    body.append(f"<h2>{_escape(task)}</h2>" if len(tasks) > 1 else
                "<h2>Results</h2>")
    same = [(i, run) for i, run in enumerate(runs)
            if run.cfg.task.name == task]
    body.append(_table(same, _results([run for _, run in same])))
    body.append(_curves(panels, task, runs))
  body.append("<h2>Differences of the configs</h2>")
  if differences:
    body.append(_table(list(enumerate(runs)), (
        (key, [(text, False) for text in texts])
        for key, texts in differences.items())))
  else:
    body.append("<p>There are none.</p>" if len(runs) > 1 else
                "<p>There is one run only.</p>")
  return _PAGE.format(title=_escape(title), style=_STYLE, body="\n".join(body))


def _escape(text: object) -> str:
  return html.escape(errors.one_line(text), quote=True)


# A row: its name, and (text, whether it is the best one) for each run.
Row = tuple[str, Sequence[tuple[str, bool]]]


def _results(runs: Sequence[compare.Run]) -> Iterable[Row]:
  """The rows of the runs of one task."""

  def plain(name, texts):
    return name, [(text, False) for text in texts]

  yield plain("model", [run.cfg.model.name or "" for run in runs])
  yield plain("state", [run.state for run in runs])
  for measure in dict.fromkeys(m for run in runs for m in run.measures):
    scale = 100 if measure.is_fraction else 1
    unit = ", percent" if measure.is_fraction else ""
    up = measure.higher_is_better
    arrow = {True: " \u2191", False: " \u2193", None: ""}[up]
    name = f"{measure.name}{unit}{arrow}"
    finals = [run.final(measure.name) for run in runs]
    yield f"final {name}", _ranked(
        finals, [_number(value, scale) for value in finals], up)
    if up is None:
      continue
    bests = [run.best(measure) for run in runs]
    yield f"best {name}", _ranked(
        [best and best[0] for best in bests],
        [f"{_number(best[0], scale)} at step {best[1]:,}" if best else ""
         for best in bests], up)
  yield plain("parameters", [_count(run.n_params) for run in runs])
  yield plain("MACs of one image", [_count(run.macs) for run in runs])
  yield plain("training images a second",
              [_number(run.images_per_second) for run in runs])
  yield plain("goodput", [_number(run.goodput) for run in runs])


def _ranked(values: Sequence[float | None], texts: Sequence[str],
            up: bool | None) -> list[tuple[str, bool]]:
  """The texts, and which of them has the best value, if the values differ."""
  known = [value for value in values if value is not None and value == value]
  best = None
  if len(set(known)) > 1 and up is not None:
    best = (max if up else min)(known)
  return [(text, value is not None and value == best)
          for text, value in zip(texts, values)]


def _number(value: float | None, scale: float = 1) -> str:
  """Four significant digits, at least."""
  if value is None:
    return ""
  value *= scale
  return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _count(value: float | None) -> str:
  return "" if value is None else f"{value:,.0f}"


def _table(runs: Sequence[tuple[int, compare.Run]],
           rows: Iterable[Row]) -> str:
  """A table with a column for each (index, run)."""
  head = "".join(f"<th>{_swatch(i)}{_escape(run.name)}</th>" for i, run in runs)
  lines = "\n".join(
      f"<tr><th>{_escape(name)}</th>" + "".join(
          f"<td{' class=best' if is_best else ''}>{_escape(text)}</td>"
          for text, is_best in cells) + "</tr>"
      for name, cells in rows)
  return (f'<div class="wide"><table>\n<tr><th></th>{head}</tr>\n{lines}\n'
          "</table></div>")


def _swatch(index: int) -> str:
  r, g, b = (round(255 * part) for part in compare_plot.color(index))
  return f'<span class="swatch" style="background:rgb({r},{g},{b})"></span>'


def _curves(panels: Sequence[compare_plot.Panel], task: str,
            runs: Sequence[compare.Run]) -> str:
  """The pictures of one task."""
  pictures = []
  for panel in panels:
    if panel.task != task:
      continue
    file = io.BytesIO()
    compare_plot.write_svg(panel, file)
    data = base64.b64encode(file.getvalue()).decode()
    about = f"{panel.title} of " + ", ".join(
        runs[i].name for i, _ in panel.curves)
    pictures.append(f'<img alt="{_escape(about)}" '
                    f'src="data:image/svg+xml;base64,{data}">')
  if not pictures:
    return "<p><small>There is nothing to draw yet.</small></p>"
  return f'<div class="curves">\n{chr(10).join(pictures)}\n</div>'
