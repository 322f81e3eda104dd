"""What a merge did: norms, angles and what truncation kept, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..lora_file import Lora


FILE = "merge_report.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Adapter:
    """One that went in.

    Args:
        folder: where it is. sha256: of its adapter_model.safetensors. weight: its factor.
        rank: largest of its modules. modules: how many it has.
        norm: ‖ΔW_t‖ over all modules, its own scale in it. share: norm² in Σ norm², 0..1.
        kept: share (0..1) of its energy ‖ΔW_t‖² between the left and right directions that the merged update has.
        output_error: ‖(ΔW - ΔW_t) x‖ / ‖ΔW_t x‖ over its own inputs, root mean square; None where they are not known.
    """

    folder: str
    sha256: str
    weight: float
    rank: int
    modules: int
    norm: float
    share: float
    kept: float
    output_error: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """What `merge_adapters` did.

    Args:
        rule, before, after, options, seed, canonical: as they ran.
        space: where the rule ran: "core", "factors", "full" or "inputs".
        ordered: whether the result depends on the order of the adapters.
        rank: of the written LoRA. wanted_rank: what was asked for.
        adapters: one entry a folder, in order.
        norm: ‖ΔW‖ of the result. mean_norm: mean of the adapters' norms.
        cosine: of ΔW_s and ΔW_t over all modules. rows, columns: overlap ‖P_s P_t‖² / min(r_s, r_t), 0..1, of the
            row and column spaces; mean over the modules that both have.
        interference: [t][s] is ‖ΔW_s x‖ / ‖ΔW_t x‖ over the inputs of t, root mean square over all modules: what s
            adds to the outputs of t beside its own; None where inputs are not known, and for a t that does nothing
            to its own.
        tried: strength -> how far the answers of its merge are from each adapter's, mean KL(p_t ‖ p) in nats, before
            `distill`; {} where one strength was given. `options` has the one that stayed. In the JSON strengths are
            strings, and what is not finite is null.
        warnings: what was said while merging.
        versions: of the packages that took part.
        loras: module -> the merged ΔW; not in the JSON.
    """

    rule: str
    space: str
    ordered: bool
    rank: int
    adapters: list[Adapter]
    norm: float
    mean_norm: float
    cosine: list[list[float]]
    rows: list[list[float]]
    columns: list[list[float]]
    interference: list[list[float] | None] | None = None
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    canonical: bool = True
    wanted_rank: str | int | float = "sum"
    tried: dict[float, list[float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in ("torch", "peft")})
    loras: dict[str, Lora] = field(default_factory=dict, repr=False)

    def save(self, folder: Path) -> None:
        """Write FOLDER/merge_report.json."""
        fields = asdict(replace(self, loras={}))  # which would be copied
        del fields["loras"]
        tried = self.tried.items()
        fields["tried"] = {strength: [x if math.isfinite(x) else None for x in far] for strength, far in tried}
        (folder / FILE).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        last = ["distill"] if self.options.get("distill") else []
        steps = " → ".join([*self.before, self.rule, *self.after, *last])
        lines = [f"{steps}, rank {self.rank}; ‖ΔW‖ {self.norm:.4g}, mean of the adapters' {self.mean_norm:.4g}"]
        lines.append("                 adapter weight  rank     norm  share   kept  error   cosine to the others")
        for i, a in enumerate(self.adapters):
            error = "" if a.output_error is None else f"{a.output_error:.2f}"
            others = " ".join(f"{value:5.2f}" for j, value in enumerate(self.cosine[i]) if j != i)
            lines.append(
                f"{a.folder[-24:]:>24} {a.weight:6.3g} {a.rank:5d} {a.norm:8.4g} {a.share:6.1%} "
                f"{a.kept:6.1%} {error:>6}   {others}"
            )
        for strength, far in self.tried.items():
            stays = ", stays" if strength == self.options["strength"] else ""
            lines.append(f"strength {strength:g}: KL from their answers {' '.join(f'{x:.3f}' for x in far)}{stays}")
        return "\n".join([*lines, *self.warnings])


class Measures:
    """Sums over modules of what a report says of N adapters; constant memory."""

    def __init__(self, n: int) -> None:
        self.products = torch.zeros(n, n, dtype=torch.float64)  # <ΔW_s, ΔW_t>
        self.overlap = torch.zeros(2, n, n, dtype=torch.float64)  # of row and column spaces
        self.both = torch.zeros(n, n, dtype=torch.float64)  # modules that both have
        self.kept = torch.zeros(n, dtype=torch.float64)
        self.merged = 0.0  # ‖ΔW‖²

    def add(self, loras: list[Lora], merged: Lora) -> None:
        """One module: its updates, and the merged one in its SVD gauge; float64."""
        left, right = (_normed(x) for x in (merged.B, merged.A.T))
        self.merged += float((merged.B.norm(dim=0) * merged.A.norm(dim=1)).square().sum())
        present = [t for t, lora in enumerate(loras) if len(lora.A)]
        ranks = [len(loras[t].A) for t in present]
        A, B = torch.cat([loras[t].A for t in present]), torch.cat([loras[t].B for t in present], dim=1)
        grams = [[block.split(ranks, dim=1) for block in (x @ x.T).split(ranks)] for x in (A, B.T)]
        inside = list(zip((left.T @ B).split(ranks, dim=1), (A @ right).split(ranks), strict=True))
        whiten = [[_inverse_root(gram[i][i]) for i in range(len(present))] for gram in grams]
        for i, s in enumerate(present):
            self.kept[s] += (inside[i][0] @ inside[i][1]).square().sum()
            for j, t in enumerate(present[i:], i):
                self.products[s, t] += (grams[0][i][j] * grams[1][i][j]).sum()
                for k in (0, 1):
                    cosines = whiten[k][i] @ grams[k][i][j] @ whiten[k][j]
                    self.overlap[k, s, t] += cosines.square().sum() / max(1, min(ranks[i], ranks[j]))
                self.both[s, t] += 1

    def tables(self) -> dict[str, Any]:
        """norms (N,), share (N,), kept (N,) and the three N × N tables, as lists."""
        square = self.products.diagonal()
        norms = square.sqrt()
        both = self.both.clamp_min(1)
        found = {
            "cosine": self.products / (norms[:, None] * norms).clamp_min(1e-300),
            "rows": self.overlap[0] / both,
            "columns": self.overlap[1] / both,
        }
        tables: dict[str, Any] = {name: (x.triu() + x.triu(1).T).tolist() for name, x in found.items()}
        tables["norms"] = norms.tolist()
        tables["share"] = (square / square.sum().clamp_min(1e-300)).tolist()
        tables["kept"] = (self.kept / square.clamp_min(1e-300)).tolist()
        return tables


def _normed(columns: Tensor) -> Tensor:
    """Orthogonal columns at length 1, zero ones left out."""
    norms = columns.norm(dim=0)
    return columns[:, norms > 0] / norms[norms > 0]


def _inverse_root(gram: Tensor) -> Tensor:
    """G^-½ (r, r) on G's support."""
    values, W = torch.linalg.eigh(gram)
    there = values > 1e-12 * values[-1].clamp_min(1e-300)
    return (W[:, there] / values[there].sqrt()) @ W[:, there].T


def bar(items: Collection[T], what: str, shown: bool | None) -> Iterable[T]:
    """Progress through items: shown or not; None where there is a terminal."""
    return tqdm(items, desc=what, disable=None if shown is None else not shown)
