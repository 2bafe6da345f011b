"""The report: one HTML page with everything inside it, drawn from finished runs."""

import base64
import datetime
import html
import io
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from experiments.runner import files, results
from experiments.runner.api import Figure, Table
from experiments.runner.results import Run
from experiments.runner.terminal import format_cell

COLOURS = ("#3b6fb6", "#d9722e", "#3a8f5c", "#a8487d", "#7a6a3a", "#5a5f6b", "#b23a3a", "#2f8f9d")

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #dde2e8; --paper: #ffffff; --back: #f5f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 0 0 6px; }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 6px 0; } .soft { color: var(--soft); }
nav a { color: #2b5c9e; font-weight: 600; } nav li { margin: 4px 0; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 22px 26px; margin: 22px 0; }
.headline { font-size: 16px; border-left: 4px solid #3b6fb6; padding: 2px 0 2px 12px; margin: 10px 0 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 4px 0; min-width: 50%; }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--line); text-align: right; white-space: pre; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
caption { caption-side: bottom; text-align: left; color: var(--soft); font-size: 13px; padding-top: 6px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 18px; }
figure { margin: 8px 0; } figcaption { font-size: 13px; color: var(--soft); } img { width: 100%; height: auto; }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--back); padding: 12px; border-radius: 8px; overflow-x: auto; font-size: 12.5px; }
ul { padding-left: 20px; }
"""


def write(out: pathlib.Path, file: pathlib.Path | None = None) -> pathlib.Path:
    """Write the report of the newest finished runs below ``out``; returns its path.

    Raises:
        OutputError: if there is nothing to report, or the page cannot be written.
    """
    runs = list(results.latest(out).values())
    if not runs:
        raise files.OutputError(
            f"no finished run below {out}; run one first: python -m experiments run --all --out {out}"
        )
    path = file or out / "report.html"
    files.write_bytes(path, page(runs).encode())
    return path


def page(runs: Sequence[Run]) -> str:
    """The report as HTML; it names no address outside itself."""
    links = "".join(
        f'<li><a href="#{r.info["experiment"]}">{html.escape(r.info["experiment"])}</a>: '
        f"{html.escape(r.comparison.headline)}</li>"
        for r in runs
    )
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>jaxaccel: measured results</title><style>{STYLE}</style></head><body><main>"
        "<h1>jaxaccel: measured results</h1>"
        f'<p class="soft">{made}. Baseline and method got the same data, initialisation, budget and tuning grid, '
        "and took turns in one process. Numbers are from this machine.</p>"
        f"<nav><ul>{links}</ul></nav>{''.join(section(run) for run in runs)}</main></body></html>\n"
    )


def section(run: Run) -> str:
    """One experiment's part of the page."""
    from experiments import registry

    info, comparison = run.info, run.comparison
    claim = registry.get(info["experiment"]).claim
    figures = "".join(
        f'<figure><img alt="{html.escape(f.title)}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(svg(f).encode()).decode()}">'
        f"<figcaption>{html.escape(f.note)}</figcaption></figure>"
        for f in comparison.figures
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes)
    config = "\n".join(f"{key} = {value!r}" for key, value in info["config"].items())
    where = (
        f"{info.get('platform', '?')} ({info.get('device', '?')}), jax {info['jax_version']}, started {info['started']}"
    )
    return (
        f'<section id="{info["experiment"]}"><h2>{html.escape(info["experiment"])}</h2>'
        f'<p class="soft">Published claim: {html.escape(claim)}</p>'
        f'<p class="headline">{html.escape(comparison.headline)}</p>'
        f"{''.join(table_html(t) for t in comparison.tables)}"
        f'<h3>Curves</h3><div class="figures">{figures}</div>'
        f"<ul>{notes}</ul>"
        f"<details><summary>Configuration and machine</summary><p class='soft'>{html.escape(where)}</p>"
        f"<pre>{html.escape(config)}</pre></details></section>"
    )


def table_html(table: Table) -> str:
    """A table as HTML."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(format_cell(cell))}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    note = f"<caption>{html.escape(table.note)}</caption>" if table.note else ""
    return f'<h3>{html.escape(table.title)}</h3><div class="scroll"><table>{note}<tr>{head}</tr>{body}</table></div>'


def svg(figure: Figure) -> str:
    """Draw a figure as SVG text: the same bytes for the same data, no metadata, no address."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    settings: Any = {
        "svg.hashsalt": "jaxaccel",
        "svg.fonttype": "path",  # looks the same in every browser
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#5b6675",
        "axes.grid": True,
        "grid.color": "#e6e9ed",
        "font.size": 9.5,
        "legend.frameon": False,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
    }
    with mpl.rc_context(settings):
        size = (6.2, 0.9 + 0.34 * len(figure.tiles)) if figure.tiles else (6.2, 3.7)
        if _is_picture(figure):
            size = (6.2, 0.9 + 5 * len(figure.tiles) / len(figure.tiles[0]))
        canvas = Canvas(figsize=size, layout="constrained")
        axes = canvas.subplots()
        if figure.tiles:
            _draw_tiles(canvas, axes, figure)
        for i, series in enumerate(figure.series):
            colour = COLOURS[i % len(COLOURS)]
            marker = "o" if len(series.x) <= 12 else None
            axes.plot(
                series.x, series.y, label=series.label, color=colour, linewidth=1.6, marker=marker, markersize=3.5
            )
            if series.low:
                axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=figure.title, xlabel=figure.x_label, ylabel=figure.y_label)
        if figure.x_log:
            axes.set_xscale("log")
        if figure.y_log:
            axes.set_yscale("log")
        if figure.series:
            axes.legend()
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.strip() + "\n"


def _is_picture(figure: Figure) -> bool:
    """Whether tiles without any text stand for pixels."""
    return bool(figure.tiles) and not any(tile.text for row in figure.tiles for tile in row)


def _draw_tiles(canvas: Any, axes: Any, figure: Figure) -> None:
    """A grid of tiles and the scale of its colours."""
    import matplotlib as mpl
    import numpy as np

    values = [[np.nan if tile.value is None else tile.value for tile in row] for row in figure.tiles]
    known = [value for row in values for value in row if not np.isnan(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    colours = mpl.colormaps["viridis"].with_extremes(bad="#e6e9ed")
    norm = mpl.colors.Normalize(low, max(high, low + 1e-9))
    # Vector squares: an image would be drawn in pixels.
    edges: dict[str, Any] = {} if _is_picture(figure) else {"edgecolors": "white", "linewidth": 1}
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, norm=norm, **edges)
    for y, row in enumerate(figure.tiles):
        for x, tile in enumerate(row):
            dark = tile.value is not None and norm(tile.value) < 0.6
            ink = "white" if dark else "#1c2430"
            axes.text(x + 0.5, y + 0.5, tile.text, ha="center", va="center", color=ink, fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(visible=False)
    if _is_picture(figure):
        axes.set_yticks([])
        axes.set_aspect("equal")
    else:
        axes.set_yticks([y + 0.5 for y in range(len(figure.tiles))], [str(y + 1) for y in range(len(figure.tiles))])
    axes.set_xticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    canvas.colorbar(mesh, ax=axes, label=figure.tile_label, ticks=mpl.ticker.MaxNLocator(4, integer=True))
