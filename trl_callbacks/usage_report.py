"""Expert usage on paper: a CSV, a heat map, a small table."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def write_csv(path: Path, usage: Mapping[str, Tensor], top_k: Mapping[str, int]) -> Path:
    """One row a module: its name, K, and the share of tokens of each expert (empty where a module has fewer)."""
    width = max(map(len, usage.values()))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["module", "top_k", *range(width)])
        for name, shares in usage.items():
            cells = [f"{share:.6g}" for share in shares.tolist()]
            writer.writerow([name, top_k[name], *cells, *[""] * (width - len(cells))])
    return path


def write_heat_map(path: Path, usage: Mapping[str, Tensor]) -> list[Path]:
    """Modules down, experts across, the share of tokens as colour; [] where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no heat map: matplotlib is not installed (`pip install matplotlib`); the CSV has the same numbers")
        return []
    width = max(map(len, usage.values()))
    rows = [shares.tolist() + [float("nan")] * (width - len(shares)) for shares in usage.values()]
    figure = Figure(figsize=(4 + 0.25 * min(width, 64), 2 + 0.06 * min(len(rows), 300)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="viridis")
    step = -(-len(rows) // 50)  # more labels than that overlap
    names = [_short(name) for name in usage]
    axes.set_yticks(range(0, len(rows), step), names[::step], fontsize=6)
    axes.set_xlabel("expert")
    axes.set_title("share of tokens for which an expert acts")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)
    return [path]


def print_table(usage: Mapping[str, Tensor], top_k: Mapping[str, int], dead_below: float) -> None:
    """One row a kind of module ("q_proj"), through rich where it is installed."""
    kinds: dict[str, list[str]] = {}
    for name in usage:
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    header = ("module", "layers", "K", "active", "least used", "most used", "dead")
    rows = []
    for kind, names in kinds.items():
        shares = [share for name in names for share in usage[name].tolist()]
        ks = [top_k[name] for name in names]
        active = sum(usage[name].sum().item() for name in names) / len(names)
        dead = sum(share < dead_below for share in shares)
        k = str(ks[0]) if min(ks) == max(ks) else f"{min(ks)}–{max(ks)}"
        least, most = (f"{min(shares):.3f}", f"{max(shares):.3f}") if shares else ("", "")
        rows.append((kind, str(len(names)), k, f"{active:.2f}", least, most, f"{dead} of {len(shares)}"))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(*header, title="expert usage, share of tokens")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _short(name: str) -> str:
    """base_model.model.model.layers.3.self_attn.q_proj -> 3.self_attn.q_proj"""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] :]) if numbers else name
