"""An observation to a file: a PNG of all units, a page to step through them, or a film of all sampled frames.

Invariant: a file under its final name is complete (it is written beside it and renamed), and a page needs no other
file and no network: its pictures are data URLs, and its only script is its own.
Cost: a page holds one JPEG per unit, 30 to 150 kB each. A film is H.264 (`libx264`, which PyAV's wheels bring).
The PNG and the page show the first frame of each unit, the film every frame.
"""

from __future__ import annotations

import base64
import html
import io
import os
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from evs_train.errors import RecipeError
from evs_train.inspection.observe import Observation
from evs_train.inspection.panels import Panels
from evs_train.visualize import figure_title

SLOWEST, FASTEST = 2.0, 30.0  # frames per second of a film: sparse frames of a long video would stand for minutes
FEW_UNITS = 16  # a sheet of more has smaller panels
WIDEST = 1920  # pixels: what the panels of a scene share

_PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; color: #141414; margin: 1.5rem; }}
table {{ border-collapse: collapse; font-size: .85rem; }}
th, td {{ border: 1px solid #ccc; padding: .15rem .5rem; text-align: right; }}
figure {{ margin: 0 0 1rem; }} img {{ max-width: 100%; height: auto; }}
#choice {{ width: min(100%, 60rem); }} .wide {{ overflow-x: auto; }}
</style></head><body>
<h1>{title}</h1>
<p>{facts}</p>
<ul>{rates}</ul>
<p id="slider" hidden><label>temporal unit <output id="shown">0</output><br>
<input id="choice" type="range" min="0" max="{last}" value="0"></label></p>
{figures}
<h2>Tokens kept of each unit</h2>
<div class="wide"><table><thead><tr><th>unit</th><th>seconds</th>{heads}</tr></thead><tbody>
{rows}
</tbody></table></div>
<script>
const figures = document.querySelectorAll("figure"), choice = document.getElementById("choice");
function show() {{
  figures.forEach((figure, unit) => {{ figure.hidden = unit !== Number(choice.value); }});
  document.getElementById("shown").textContent = choice.value;
}}
document.getElementById("slider").hidden = false;
choice.addEventListener("input", show);
show();
</script>
</body></html>
"""


def write(seen: Observation, out: Path) -> None:
    """Write what the suffix of `out` names: .png, .html or .mp4.

    Raises:
        RecipeError: it cannot be written.
    """
    writer = WRITERS[out.suffix.lower()]
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-") as folder:
            staged = Path(folder) / f"staged{out.suffix.lower()}"
            writer(seen, staged)
            os.replace(staged, out)
    except OSError as error:
        raise RecipeError(f"{out} cannot be written: {error.strerror or error}") from error


def summary(seen: Observation) -> list[str]:
    """Lines for a terminal: what was looked at, and for each rate what is kept in total and of each unit."""
    lines = [f"units: {seen.num_units} of {seen.tokens_per_unit} tokens; scored {seen.scored_as}"]
    for rate, kept, counts in zip(seen.rates, seen.kept, seen.counts, strict=True):
        lines += [figure_title(kept, rate), "  by unit: " + " ".join(map(str, counts.tolist()))]
    return lines


def _scenes(seen: Observation) -> Panels:
    largest = max(160, min(480, WIDEST // (1 + len(seen.rates))))
    return Panels(seen, smallest=min(240, largest), largest=largest)


def _write_png(seen: Observation, out: Path) -> None:
    smallest, largest = (160, 320) if seen.num_units <= FEW_UNITS else (96, 160)
    Panels(seen, smallest, largest).sheet().save(out, format="PNG", optimize=True)


def _write_html(seen: Observation, out: Path) -> None:
    panels, figures, rows = _scenes(seen), [], []
    for unit in range(seen.num_units):
        buffer = io.BytesIO()
        panels.scene(unit * seen.frames_per_unit).save(buffer, format="JPEG", quality=90, subsampling=0)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        figures.append(f'<figure><img alt="temporal unit {unit}" src="data:image/jpeg;base64,{data}"></figure>')
        cells = "".join(f"<td>{count}</td>" for count in seen.counts[:, unit])
        rows.append(f"<tr><td>{unit}</td><td>{seen.seconds(unit):.2f}</td>{cells}</tr>")
    titles = [figure_title(kept, rate) for kept, rate in zip(seen.kept, seen.rates, strict=True)]
    page = _PAGE.format(
        title=html.escape(f"What is kept of {Path(seen.clip.path).name}"),
        facts=html.escape(
            f"{seen.clip.path}: sampled frames: {len(seen.clip.frames)}, temporal units: {seen.num_units} of "
            f"{seen.tokens_per_unit} tokens. Scored {seen.scored_as}. Dimmed patches are dropped."
        ),
        rates="".join(f"<li>{title}</li>" for title in titles),
        last=seen.num_units - 1,
        figures="\n".join(figures),
        heads="".join(f"<th>rate {rate:g}</th>" for rate in seen.rates),
        rows="\n".join(rows),
    )
    out.write_text(page, encoding="utf-8")


def _write_mp4(seen: Observation, out: Path) -> None:
    panels, times = _scenes(seen), seen.clip.timestamps
    fps = (len(times) - 1) / float(times[-1] - times[0]) if len(times) > 1 else SLOWEST
    with av.open(str(out), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(min(max(fps, SLOWEST), FASTEST)).limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"}
        for number in range(len(times)):
            scene = np.asarray(panels.scene(number))
            if number == 0:
                stream.height, stream.width = scene.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene, format="rgb24")))
        container.mux(stream.encode())


WRITERS: dict[str, Callable[[Observation, Path], None]] = {
    ".png": _write_png,
    ".html": _write_html,
    ".mp4": _write_mp4,
}
