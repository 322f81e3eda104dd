"""Forgetting matrices side by side: what each way still knows of every task, after every task that it learns.

python recipes/measure/forgetting.py                # the picture in the docs, of the two runs in docs/data
python recipes/measure/forgetting.py out/continual/sequential-0/matrix.csv --titles LoRA

A matrix.csv is what continual.py writes; the picture goes beside the first. Tasks that are still to come are left
out; perplexity is shown over that of the first row, the model before it has learnt anything.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


DOCS = Path(__file__).parent.parent.parent / "docs"
MATRICES = [DOCS / "data" / f"forgetting-{name}.csv" for name in ("lora", "ours")]
TITLES = ["one LoRA through all tasks", "MORA, projected, text protected"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "matrices", nargs="*", type=Path, default=MATRICES, help="matrix.csv of runs (those in docs/data)"
    )
    parser.add_argument("--titles", nargs="+", help="one a matrix (names of their folders)")
    parser.add_argument("--metric", default="greedy", help="of the columns, `greedy` or `label` (%(default)s)")
    parser.add_argument("--output", type=Path, help="svg or png (forgetting.svg beside the first matrix)")
    args = parser.parse_args()
    docs = args.matrices == MATRICES
    args.titles = args.titles or (TITLES if docs else [path.resolve().parent.name for path in args.matrices])
    args.output = args.output or (DOCS / "images" if docs else args.matrices[0].parent) / "forgetting.svg"
    if len(args.titles) != len(args.matrices):
        parser.error(f"{len(args.titles)} --titles for {len(args.matrices)} matrices")
    return args


def read(path: Path, metric: str) -> tuple[list[str], list[list[float]], list[float]]:
    """Tasks, their scores (stages, tasks) after each was learnt, and perplexity by the first row's, if it is there."""
    if not path.is_file():
        raise SystemExit(f"{path} is no file: give the matrix.csv of a run of continual.py")
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    if len(lines) < 3:
        raise SystemExit(f"{path} has {len(lines)} lines: give the matrix.csv of a run of continual.py")
    head, first, *rows = lines
    places = [i for i, name in enumerate(head) if name.endswith(f" {metric}")]
    if not places:
        raise SystemExit(f"{path} has no column of {metric!r}; it has {', '.join(head[1:])}")
    general = next((i for i, name in enumerate(head) if "perplexity" in name), None)
    try:
        scores = [[float(row[i]) for i in places] for row in rows]
        ratios = [float(row[general]) / float(first[general]) for row in rows] if general is not None else []
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise SystemExit(f"{path} has what is no score ({error}): give the matrix.csv of a whole run") from error
    return [head[i].removesuffix(f" {metric}") for i in places], scores, ratios


def draw(matrices: list[tuple[list[str], list[list[float]], list[float]]], titles: list[str]) -> Figure:
    size = len(matrices[0][0])
    figure = Figure(figsize=(len(matrices) * (2.6 + 0.6 * size), 1.3 + 0.5 * size), layout="constrained")
    for axes, (tasks, scores, ratios), title in zip(
        figure.subplots(1, len(matrices), squeeze=False)[0], matrices, titles, strict=True
    ):
        shown = [[value if j <= i else float("nan") for j, value in enumerate(row)] for i, row in enumerate(scores)]
        axes.imshow(shown, cmap="Blues", vmin=0, vmax=1)
        for i, row in enumerate(shown):
            for j, value in enumerate(row[: i + 1]):
                text = f"{value:.2f}".lstrip("0")
                axes.text(j, i, text, ha="center", va="center", color="white" if value > 0.55 else "black")
            if ratios:
                axes.text(len(tasks) + 0.4, i, f"× {ratios[i]:.2f}", ha="center", va="center")
        if ratios:
            axes.set_xlim(-0.5, len(tasks) + 1.1)
        more = [(len(tasks) + 0.4, "perplexity of\nother text")] if ratios else []
        places, names = zip(*enumerate(tasks), *more, strict=True)
        axes.set_xticks(places, names)
        axes.set_yticks(range(len(tasks)), [f"after {task}" for task in tasks])
        axes.set_title(title, loc="left")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return figure


def main() -> None:
    args = parse()
    matplotlib.rcParams["svg.hashsalt"] = "forgetting"  # the same file from the same numbers
    figure = draw([read(path, args.metric) for path in args.matrices], args.titles)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    kept = {"metadata": {"Date": None}} if args.output.suffix == ".svg" else {}
    figure.savefig(args.output, dpi=150, facecolor="white", **kept)
    print(args.output)


if __name__ == "__main__":
    main()
