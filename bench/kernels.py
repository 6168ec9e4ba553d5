"""`python -m bench.kernels [only=NAME,..] [tokens=2048,8192,..]`: kernels beside their peers and the limit.

On a GPU every kernel runs forward and backward in bfloat16 with the dims of a model; a table and a plot show
its time, that of fla-core and torch in the same run, and the share of the least time that the GPU allows. The
results go to bench/results/kernels-DEVICE.json. Without a GPU it prints work and bytes, and times nothing.
"""

import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from bench.kernel_peers import peers_of
from bench.origin import origin
from conf.help import Page, run
from kernels.limits import Limits, measured_limits, seconds, share
from kernels.spec import KernelCase, KernelSpec, input_factory, kernel_specs
from kernels.verdict import times

TOKENS = (2048, 8192, 32768, 131072)
RESULTS = Path("bench/results")
# For the model of a machine that is not there: measured on an H100 with large products and copies.
H100 = Limits(798e12, 3.0e12)


def main(arguments: list[str]) -> None:
    """Prints the table, and on a GPU writes the JSON and the plot."""
    given = dict(argument.split("=", 1) for argument in arguments)
    only = given["only"].split(",") if "only" in given else None
    tokens = tuple(map(int, given["tokens"].split(","))) if "tokens" in given else TOKENS
    wanted = [s for s in kernel_specs() if only is None or s.name in only or s.name.split(".")[0] in only]
    if not torch.cuda.is_available():
        show_model(wanted, tokens)
        return
    limits = measured_limits(torch.device("cuda"))
    rows = []
    for spec in wanted:
        for count in tokens:
            rows.append(measure(spec, count, limits))
            print(described(rows[-1]), flush=True)
    write(rows, limits)


def show_model(wanted: list[KernelSpec], tokens: Sequence[int]) -> None:
    """The cost of every kernel, and the least time that it takes on an H100 by its formula."""
    print("no GPU here: nothing was timed. Work and bytes, and the least time at 798 TFLOP/s and 3.0 TB/s:")
    print(f"{'kernel':28s} {'tokens':>7s} {'forward':>24s} {'backward':>24s} {'least, ms':>18s}")
    for spec in wanted:
        for count in tokens:
            cost = spec.cost(spec.shape_at(count))
            forward = H100.seconds(cost.forward_flops, cost.forward_bytes) * 1e3
            backward = H100.seconds(cost.backward_flops, cost.backward_bytes) * 1e3
            moved = [f"{flops / 1e12:9.3f} TF {size / 1e9:8.3f} GB" for flops, size in (cost[:2], cost[2:])]
            least = f"{forward:8.3f} {backward:8.3f}"
            print(f"{spec.name:28s} {count:7d} {moved[0]:>24s} {moved[1]:>24s} {least}")


def measure(spec: KernelSpec, tokens: int, limits: Limits) -> dict[str, Any]:
    """Milliseconds of ours and of the peers, forward and backward, and the shares of the limit."""
    shape = spec.shape_at(tokens)
    row: dict[str, Any] = {"kernel": spec.name, "tokens": tokens}
    case: KernelCase | None = None
    try:
        case = spec.draw(shape, input_factory(torch.bfloat16, "cuda"))
        forward, backward = times(case, seconds)
    except torch.cuda.OutOfMemoryError:
        row["weft"] = "out of memory"
        return row
    row["weft"] = milliseconds(forward, backward)
    row["share"] = share(spec.cost(shape), limits, forward, backward)
    for name, build in peers_of(spec.name).items():
        row[name] = tried(lambda build=build, case=case: times(case._replace(triton=build(shape)), seconds))
    return row


def tried(function: Callable[[], tuple[float, float | None]]) -> list[float | None] | str:
    """Milliseconds, or why a peer gave none: it may not take the dims, or not fit."""
    try:
        return milliseconds(*function())
    except Exception as error:
        torch.cuda.empty_cache()
        return f"{type(error).__name__}: {str(error)[:120]}"


def milliseconds(forward: float, backward: float | None) -> list[float | None]:
    """Both in milliseconds."""
    return [forward * 1e3, None if backward is None else backward * 1e3]


def described(row: dict[str, Any]) -> str:
    """One line of the table."""
    parts = [f"{row['kernel']:28s} {row['tokens']:7d}"]
    for name in ("weft", "fla", "torch"):
        found = row.get(name)
        if isinstance(found, str):
            parts.append(f"{name} {found[:40]}")
        elif found is not None:
            parts.append(f"{name} " + " / ".join("-" if x is None else f"{x:.3f}" for x in found) + " ms")
    if "share" in row:
        parts.append("limit " + " / ".join("-" if x is None else f"{x:.0%}" for x in row["share"]))
    return "  ".join(parts)


def write(rows: list[dict[str, Any]], limits: Limits) -> None:
    """The JSON with device and versions, and the plot beside it."""
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    head = {
        **origin("one device", torch.cuda.get_device_name()),
        "triton": triton.__version__,
        "python": platform.python_version(),
        "tflops": limits.flops / 1e12,
        "terabytes": limits.bytes / 1e12,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"kernels-{name}.json").write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    plot(rows, head["device"], RESULTS / f"kernels-{name}.png")


def plot(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """The share of the limit of every kernel by tokens, forward and backward."""
    from matplotlib.figure import Figure

    names = sorted({row["kernel"] for row in rows if "share" in row})
    figure = Figure(figsize=(12, max(3.0, 0.35 * len(names) + 1.5)), layout="constrained")
    for column, title in enumerate(("forward", "backward")):
        axes = figure.add_subplot(1, 2, column + 1)
        for marker, tokens in zip("o^sD", TOKENS, strict=True):
            found = {r["kernel"]: r["share"][column] for r in rows if r["tokens"] == tokens and "share" in r}
            kept = {name: value for name, value in found.items() if value is not None}
            axes.plot(
                [100 * x for x in kept.values()], [names.index(n) for n in kept], marker, label=f"{tokens:,}"
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel(f"{title}: percent of the least time on {device}")
        axes.set_xlim(0, 100)
        axes.grid(alpha=0.3)
        axes.legend(title="tokens")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(
        main,
        Page(
            __doc__ or "",
            ("python -m bench.kernels", "python -m bench.kernels only=attention,experts tokens=2048,8192"),
        ),
    )
