"""The pictures of the pages, as SVG text drawn from committed results.

`python -m bench.pictures` draws docs/pictures/ anew; with `run=DIR` it first takes the curve of a run into
bench/results/default-run.json, with `count` it first counts bench/results/cache.json.
"""

import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench.origin import origin
from conf.compose import compose
from conf.errors import exit_on_error

RESULTS, PICTURES = Path("bench/results"), Path("docs/pictures")
RUN, CACHE = RESULTS / "default-run.json", RESULTS / "cache.json"
WIDTH = 720
# A background of its own: a page may be dark where the reader's system is light, and the reverse.
STYLE = """
  .paper { fill: #ffffff; stroke: #d0d7de; } text { fill: #1f2328; font: 13px system-ui, sans-serif; }
  .title { font-weight: 600; font-size: 15px; } .quiet { fill: #59636e; }
  .box { fill: #eef2f6; stroke: #8c959f; } .axis { stroke: #8c959f; } .grid { stroke: #d0d7de; }
  .a { stroke: #0969da; fill: none; } .fill { fill: #0969da; }
  .b { stroke: #bc4c00; } .b-fill { fill: #bc4c00; }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117; stroke: #3d444d; } text { fill: #f0f6fc; } .quiet { fill: #9198a1; }
    .box { fill: #1c232c; stroke: #656c76; } .axis { stroke: #656c76; } .grid { stroke: #3d444d; }
    .a { stroke: #58a6ff; } .fill { fill: #58a6ff; } .b { stroke: #f0883e; } .b-fill { fill: #f0883e; }
  }
"""
# Context of the caches, and who stands for which attention.
CONTEXT = 131_072
DESIGNS = {
    "qwen3_235b_a22b": "grouped-query attention in every layer",
    "deepseek_v3": "MLA: one latent for all heads",
    "minimax_text_01": "7 lightning : 1 full attention",
    "gpt_oss_120b": "1 window of 128 : 1 full attention",
    "qwen3_5_397b_a17b": "3 Gated DeltaNet : 1 full attention",
    "kimi_linear_48b_a3b": "3 KDA : 1 MLA",
    "deepseek_v4_flash": "compressed entries: CSA and HCA",
}
# Packages from the top of the house down, those side by side in one row, and what each knows.
HOUSE = (
    (("train", "commands, loop, optimizers, evaluation, checkpoints, tracking"),),
    (("parallel", "mesh, FSDP2, tensor, context, expert and pipeline parallelism, rehearsal"),),
    (("model", "mixers, experts, residual streams, hub checkpoints"), ("data", "documents, tokens, packing")),
    (("kernels", "one folder per operation: reference, Triton, spec"),),
    (("conf", "yaml groups, composition, typed validation, errors"),),
)


def main(arguments: list[str]) -> None:
    """Takes what is asked for into the results, then writes all pictures."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "run":
            RUN.write_text(as_json(curve_of(Path(value))))
        elif name == "count":
            CACHE.write_text(as_json(caches()))
    PICTURES.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (PICTURES / name).write_text(text)


def pictures() -> dict[str, str]:
    """SVG text of every picture by its file name."""
    return {
        "house.svg": house(),
        "loss.svg": loss(json.loads(RUN.read_text())),
        "cache.svg": cache(json.loads(CACHE.read_text())),
    }


def as_json(value: Any) -> str:
    """Lists of numbers on one line each."""
    lines = (f" {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def curve_of(directory: Path) -> dict[str, Any]:
    """Losses of a run in nats per token, and what gzip and xz need of the same held-out text."""
    config = json.loads((directory / "config.json").read_text())
    lines, held_out = (
        [json.loads(line) for line in (directory / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "evaluations.jsonl")
    )
    card = json.loads((Path(config["data"]["directory"]) / "card.json").read_text())["held_out"]
    nats = 8 * math.log(2) / (card["tokens"] - card["documents"])
    return {
        **origin("training on this machine"),
        "steps": config["train"]["steps"],
        "loss": [line["loss"] and round(line["loss"], 4) for line in lines],
        "held_out": [[line["step"], round(line["loss"], 4)] for line in held_out],
        "gzip": round(card["gzip_bytes"] * nats, 4),
        "xz": round(card["xz_bytes"] * nats, 4),
    }


def caches() -> dict[str, Any]:
    """What `python -m train.plan plan.context=131072` counts of one sequence, by model."""
    from model.config import Architecture
    from model.count import count

    counted = {name: count(compose([f"model={name}"], Architecture)) for name in DESIGNS}
    return {name: [counts.cache_bytes(CONTEXT), counts.main] for name, counts in counted.items()}


def house() -> str:
    """The packages, one above the other; what stands above imports what stands below."""
    height, gap, left, right, parts = 50, 14, 60, WIDTH - 24, []
    for level, row in enumerate(HOUSE):
        top, wide = 56 + level * (height + gap), [0.6, 0.4] if len(row) > 1 else [1.0]
        x = float(left)
        for (name, knows), share in zip(row, wide, strict=True):
            w = (right - left - gap * (len(row) - 1)) * share
            parts.append(f'<rect class="box" x="{x:g}" y="{top}" width="{w:g}" height="{height}" rx="6"/>')
            parts.append(label(x + 14, top + 21, name, "title"))
            parts.append(label(x + 14, top + 39, knows, "quiet"))
            x += w + gap
    bottom = 56 + len(HOUSE) * (height + gap) - gap
    parts.append(f'<path class="axis" fill="none" d="M34 60V{bottom - 6}m-5 -8l5 8l5 -8"/>')
    return svg(bottom + 24, "Imports point down only; import-linter checks it", parts)


def loss(run: dict[str, Any]) -> str:
    """Training and held-out loss over the steps, which are on a logarithmic scale."""
    losses, steps = run["loss"], run["steps"]
    left, right, top, bottom = 56, WIDTH - 24, 56, 330
    low, high = math.floor(run["xz"]), math.ceil(max(x for x in losses if x is not None))

    def at(step: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * math.log(step) / math.log(steps)
        return round(x, 1), round(bottom - (bottom - top) * (value - low) / (high - low), 1)

    parts = []
    for value in range(low, high + 1):
        y = at(1, value)[1]
        parts += [line("grid", left, y, right, y), label(left - 8, y + 4, str(value), "quiet", "end")]
    # A power of ten near the last step would stand in its number.
    for step in [10**n for n in range(int(math.log10(steps)) + 1) if 10**n < steps / 2] + [steps]:
        x = at(step, low)[0]
        parts += [line("grid", x, top, x, bottom), label(x, bottom + 18, f"{step:,}", "quiet", "middle")]
    parts.append(label(right, bottom + 36, "step, logarithmic", "quiet", "end"))
    for name in ("gzip", "xz"):
        y = at(1, run[name])[1]
        parts.append(line("b", left, y, right, y, ' stroke-dasharray="6 4"'))
        parts.append(label(left + 8, y - 5, f"{name} -9 of the held-out text: {run[name]:.2f}"))
    points = [at(i + 1, x) for i, x in enumerate(losses) if x is not None]
    parts.append(polyline("a", points, 1))
    parts.append(label(points[0][0] + 8, points[0][1] - 8, "training loss of each step, nats per token"))
    done = [tuple(pair) for pair in run["held_out"]]
    parts += [dot(*at(*pair)) for pair in done]
    earlier = run.get("earlier_end")
    if earlier:
        x, y = at(*earlier)
        parts += [dot(x, y), label(x - 8, y - 8, f"earlier run, at its end: {earlier[1]:.3f}", "", "end")]
    parts += [dot(left + 8, bottom + 32), label(left + 18, bottom + 36, "held-out loss", "quiet")]
    title = "The default run" if len(losses) == steps else f"The default run, its first {len(losses)} steps"
    return svg(bottom + 54, f"{title} of {steps:,}" if len(losses) < steps else title, parts)


def cache(counted: dict[str, Any]) -> str:
    """What decoding keeps of one sequence, as bars."""
    left, right, top, step = 330, WIDTH - 90, 62, 34
    largest = max(size for size, _ in counted.values())
    parts = []
    for i, (name, (size, parameters)) in enumerate(counted.items()):
        y, w = top + i * step, (right - left) * size / largest
        parts.append(label(24, y + 10, DESIGNS[name]))
        parts.append(label(24, y + 25, f"{name}, {parameters / 1e9:,.0f} B parameters", "quiet"))
        parts.append(f'<rect class="fill" x="{left}" y="{y}" width="{w:.1f}" height="22" rx="3"/>')
        parts.append(label(left + w + 8, y + 16, f"{size / 2**30:.2f} GiB"))
    title = f"Cache of one sequence of {CONTEXT:,} tokens, all layers, counted"
    return svg(top + len(counted) * step + 14, title, parts)


def svg(height: float, title: str, parts: Sequence[str]) -> str:
    """A picture on its own paper, its title at the top and for readers who see none."""
    size = f'width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}"'
    paper = f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">'
    body = "\n".join([paper, label(24, 32, title, "title"), *parts])
    return f"{head}\n<style>{STYLE}</style>\n{body}\n</svg>\n"


def label(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """Text at a point; anchor says which of its ends is there."""
    named = f' class="{kind}"' if kind else ""
    placed = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text{named} x="{x:g}" y="{y:g}"{placed}>{escape(text)}</text>'


def line(kind: str, x1: float, y1: float, x2: float, y2: float, more: str = "") -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"{more}/>'


def polyline(kind: str, points: Sequence[tuple[float, float]], width: float) -> str:
    """A line through points."""
    drawn = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline class="{kind}" stroke-width="{width:g}" points="{drawn}"/>'


def dot(x: float, y: float) -> str:
    """A mark of a held-out loss."""
    return f'<circle class="b-fill" cx="{x:g}" cy="{y:g}" r="4"/>'


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
