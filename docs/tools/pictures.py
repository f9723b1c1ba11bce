"""Draw the pictures of docs/concepts.md: ``python docs/tools/pictures.py`` writes docs/pictures/*.svg.

Numbers come from the certificates of the demo's models, in model_cards/; lines and marks are the report's own.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

from markupsafe import Markup

from hf_immunize.records import Certificate
from hf_immunize.report.svg import Axis, Frame, element, line, mark, percent_axis, picture, x_axis

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards" / "digits-vit"
STYLE = """svg{background:#fff;font-family:system-ui,sans-serif}
text{font-size:12px;fill:#222}.small{font-size:11px;fill:#555}
.head{font-size:13px;font-weight:600}.tick,.label{font-size:11px;fill:#555}.axis{stroke:#777}.grid{stroke:#ddd}
.box{fill:#f4f7f7;stroke:#5b7f7c}.bad{fill:#fbf1ee;stroke:#b0573d}.judge{fill:#f3f1f9;stroke:#6a5c9c}
.arrow{stroke:#444;fill:none;stroke-width:1.4}.tip{fill:#444}.without{stroke:#777;stroke-dasharray:3 3;stroke-width:1.5}
.aim{stroke:#b0573d;stroke-width:1.5}.span{stroke:#9db6b4;stroke-width:6}.before{fill:#b0573d}.after{fill:#1f6f69}
.range{stroke-width:3}.RESISTS{stroke:#146c2e;fill:#146c2e}.FAILS{stroke:#b3261e;fill:#b3261e}
.INCONCLUSIVE{stroke:#8a5300;fill:#8a5300}
text.RESISTS,text.FAILS,text.INCONCLUSIVE{stroke:none}polyline.open{stroke-dasharray:5 3;fill:none}"""


def at(words: str, x: float, y: float, css: str = "", anchor: str = "start") -> Markup:
    """A line of text."""
    return element("text", words, x=x, y=y, class_=css or None, text_anchor=anchor)


def whole(frame: Frame, label: str, told: str, *parts: Markup) -> str:
    """A picture that needs no other file."""
    drawn = picture(frame, label, told, element("style", Markup(STYLE)), *parts)
    return str(drawn).replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{frame.width:g}" ', 1) + "\n"


def uplift(name: str) -> str:
    """For each attack: where raw pixels end, where the base ends, half of the way, and where this model ends."""
    cells = [cell for cell in certificate(name).cells if cell.subject and cell.control and cell.uplift]
    least = min(fmean(cell.subject.accuracy) for cell in cells)
    across, height = percent_axis(10 * math.floor(10 * least), 90), 96 + 30 * len(cells)
    frame = Frame(across, Axis(0, len(cells) + 1, ()), 760, height, 200, 24, 50, 44)
    parts = [x_axis(frame, "accuracy on harmful classes that the attacker ends with, percent")]
    for place, cell in enumerate(cells):
        y, without = len(cells) - place, 100 * (cell.without_model or 0)
        base, here = 100 * fmean(cell.control.accuracy), 100 * fmean(cell.subject.accuracy)
        _, down = frame.at(0, y)
        left, right, half = (frame.at(value, y)[0] for value in (without, base, 100 * cell.threshold))
        parts += [at(cell.attack, frame.left - 12, down + 4, anchor="end"),
                  element("line", x1=left, x2=right, y1=down, y2=down, class_="span"),
                  element("line", x1=half, x2=half, y1=down - 9, y2=down + 9, class_="aim"),
                  mark(right, down, "circle", "before", 5), mark(frame.at(here, y)[0], down, "diamond", "after", 6)]
    nothing = 100 * (cells[0].without_model or 0)
    left = frame.at(nothing, 0)[0]
    parts.append(element("line", x1=left, x2=left, y1=40, y2=frame.height - frame.bottom, class_="without"))
    legend = [("without the model", "without"), ("base", "before"), ("half of the uplift: success", "aim"),
              ("this model", "after")]
    for place, (words, css) in enumerate(legend):
        x = 205 + (0, 150, 215, 400)[place]
        parts.append(mark(x, 16, "diamond" if css == "after" else "circle", css, 5) if css in ("before", "after") else
                     element("line", x1=x, x2=x, y1=8, y2=24, class_=css))
        parts.append(at(words, x + 10, 20, "small"))
    return whole(frame, f"Uplift, attack by attack, of {name}", f"Means over seeds in {name}/certificate.json.", *parts)


def verdicts(name: str) -> str:
    """Slow-downs with their intervals beside the factor four, and the verdict that each of them gets."""
    cells = [cell for cell in certificate(name).cells if cell.unit == "step" and cell.slow_down.low]
    ticks = tuple((value, f"{value:,g}×") for value in (1, 2, 4, 10, 100, 1000))
    across, height = Axis(0.8, 6000, ticks, log=True), 84 + 28 * len(cells)
    frame = Frame(across, Axis(0, len(cells) + 1, ()), 760, height, 200, 130, 24, 44)
    four = frame.at(4, 0)[0]
    parts = [x_axis(frame, "slow-down: the attacker's steps on this model over the steps on its base"),
             element("line", x1=four, x2=four, y1=18, y2=frame.height - frame.bottom, class_="aim"),
             at("asked for", four + 5, 24, "small")]
    for place, cell in enumerate(cells):
        y, low, high = len(cells) - place, cell.slow_down.low or 1, cell.slow_down.high
        css = f"range {cell.verdict}"
        parts += [at(cell.attack, frame.left - 12, frame.at(1, y)[1] + 4, anchor="end"),
                  line(frame, [(low, y), (high or 6000, y)], css if high else f"{css} open"),
                  mark(*frame.at(cell.slow_down.estimate or low, y), "circle" if high else "triangle", cell.verdict, 5),
                  at(cell.verdict, frame.width - frame.right + 12, frame.at(1, y)[1] + 4, cell.verdict)]
    return whole(frame, f"Slow-downs and verdicts of {name}",
                 "Lines are 95 % intervals; a dashed line has no upper end, as the attacker never got there.", *parts)


def threat_model() -> str:
    """Who holds what: defender, attacker, judge."""
    frame = Frame(Axis(0, 1, ()), Axis(0, 1, ()), 760, 330)
    parts = [*box(20, 40, 200, 118, "box", "Defender", "holds the base (θ₀),", "images to keep (primary)",
                  "and a part of the", "harmful images (defense)"),
             *box(280, 40, 200, 118, "box", "Release", "weights that anyone", "can download, and",
                  "immunization.json"),
             *box(540, 40, 200, 118, "bad", "Attacker", "holds the release and", "harmful images of their own",
                  "(attack); trains as they like,", "within a budget"),
             *box(540, 200, 200, 104, "bad", "Without the model", "the same harmful images,", "raw pixels, or random",
                  "weights"),
             *box(280, 200, 200, 104, "judge", "Judge", "the same attacks on release", "and base, scored on images",
                  "nobody trained on (test)"),
             *box(20, 200, 200, 104, "judge", "certificate.json", "verdict by verdict, with", "budgets, intervals, and",
                  "hashes of weights and traces"),
             *arrow(220, 99, 278, 99), *arrow(480, 99, 538, 99), *arrow(540, 140, 470, 200), *arrow(540, 252, 482, 252),
             *arrow(280, 252, 222, 252), at("the base is attacked as well", 232, 182, "small"),
             *arrow(120, 158, 296, 200)]
    return whole(frame, "Who holds what", "Defender, release, attacker, judge and certificate.", *parts)


def box(x: float, y: float, width: float, height: float, css: str, head: str, *lines: str) -> list[Markup]:
    """A box with a heading and lines of text."""
    drawn = [element("rect", x=x, y=y, width=width, height=height, rx=6, class_=css), at(head, x + 12, y + 24, "head")]
    return drawn + [at(words, x + 12, y + 46 + 17 * place) for place, words in enumerate(lines)]


def arrow(x1: float, y1: float, x2: float, y2: float) -> list[Markup]:
    """An arrow from one point to another."""
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    u, v = (x2 - x1) / length, (y2 - y1) / length
    back = (x2 - 9 * u, y2 - 9 * v)
    points = [(x2, y2), (back[0] - 4 * v, back[1] + 4 * u), (back[0] + 4 * v, back[1] - 4 * u)]
    return [element("line", x1=x1, y1=y1, x2=back[0], y2=back[1], class_="arrow"),
            element("polygon", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_="tip")]


def certificate(name: str) -> Certificate:
    """The certificate of one of the demo's models."""
    return Certificate.read(CARDS / name / "certificate.json")


def pictures() -> dict[str, str]:
    """Every picture of the concepts page, by the name of its file."""
    return {
        "threat-model.svg": threat_model(), "uplift.svg": uplift("closed_form_adversary"),
        "verdicts.svg": verdicts("closed_form_adversary"),
    }


if __name__ == "__main__":
    for file, drawn in pictures().items():
        (ROOT / "docs" / "pictures" / file).write_text(drawn, encoding="utf-8")
