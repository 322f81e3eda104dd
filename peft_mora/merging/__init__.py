"""Adapters in, one plain LoRA out: files only, no base model.

>>> from peft_mora.merging import merge_adapters
>>> print(merge_adapters(["out/maths", "out/code"], rule="sum", output="out/both"))
"""

from __future__ import annotations

import hashlib
import inspect
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..checks import check_field, is_int, is_number, listed
from ..files import check_new
from ..inputs import batches_of, check_length, check_text, text_tokenizer, writes_text
from ..lora_file import Lora, check_finite, write_lora
from . import distillation, rules, scaling
from .adapters import Adapters, check_weights
from .core import core_space, reduced, single, to_lora
from .inputs import (
    LAST,
    Statistics,
    adapted,
    check_base,
    check_looking,
    check_strengths,
    check_system,
    collect_inputs,
    encoded,
    input_spreads,
    inputs,
    output_energies,
    output_error,
    saved_tokenizer,
    texts_of,
)
from .into_base import IntoBase, merge_into_base
from .lego import lego, robust
from .report import Adapter, Measures, MergeReport, bar
from .sequential import opcm, slao
from .written import own_texts


__all__ = ["RULES", "IntoBase", "MergeReport", "collect_inputs", "merge_adapters", "merge_into_base"]


def options_of(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that are given by name only."""
    kinds = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in kinds if parameter.kind is parameter.KEYWORD_ONLY]


class Rule(NamedTuple):
    """How a rule is called: `merge(cores or loras, weights, ...)`, and what it is given besides.

    Args:
        space: "core", "factors", or "inputs": factors, and what went into the module.
        elementwise: entries count one by one, so that the basis matters; it can run on those of ΔW instead.
        ordered: the order of the adapters matters.
        ranked: it is told the rank.
    """

    merge: Callable[..., Any]
    space: str = "core"
    elementwise: bool = False
    ordered: bool = False
    ranked: bool = False

    def options(self) -> list[str]:
        """Names that `merge_adapters` takes for it."""
        own = options_of(self.merge)
        return own + (["space"] if self.elementwise else []) + (["density"] if self.merge is rules.ties else [])


RULES = {
    "inputs": Rule(inputs, "inputs"),
    "sum": Rule(rules.sum_cores),
    "mean": Rule(rules.mean_cores),
    "ties": Rule(rules.ties, elementwise=True),
    "dare": Rule(rules.dare, elementwise=True),
    "tsv": Rule(rules.tsv),
    "iso-c": Rule(rules.iso_c),
    "iso-cts": Rule(rules.iso_cts),
    "least-squares": Rule(rules.least_squares),
    "lore": Rule(rules.lore),
    "lego": Rule(lego, "factors", ranked=True),
    "robust": Rule(robust, "factors"),
    "opcm": Rule(opcm, "factors", ordered=True, ranked=True),
    "slao": Rule(slao, "factors", ordered=True),
}
BEFORE = {"norm": scaling.norm, "pico": scaling.pico}
AFTER: dict[str, Callable[..., Any]] = {"match": scaling.match, "svc": scaling.svc, "lines": scaling.lines}


def merge_adapters(
    folders: Sequence[str | Path],
    rule: str = "inputs",
    rank: str | int | float = "sum",
    weights: Sequence[float] | None = None,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    seed: int = 0,
    output: str | Path | None = None,
    *,
    canonical: bool = True,
    model: nn.Module | None = None,
    prompts: Mapping[str | Path, Sequence[str]] | str | None = None,
    tokenizer: Any = None,
    passes: int = 2,
    directions: int = 32,
    last: float = LAST,
    strength: float | Sequence[float] = (0.5, 1.0),
    distill: int = 0,
    learning_rate: float = 3e-4,
    answer_tokens: int = 16,
    batch_size: int = 8,
    progress: bool | None = None,
    **options: Any,
) -> MergeReport:
    """Merge adapters of one base model into one plain LoRA that PEFT opens without this package.

    Args:
        folders: saved adapters: LoRA, LORI, FURINA, MORA "dense", MTLLORA by its `default_task`. A module that one
            lacks is an update of 0.
        rule: a key of `RULES`. "inputs" where all folders hold input statistics (`collect_inputs`), or `prompts` are
            given; if not, it warns and takes what needs no data: "sum" for two adapters, "iso-c" · 2 for more; with
            weights, `ridge` or `floor` it is refused.
        rank: of the result. "sum" keeps all that there is, at most Σr; k truncates every module to k; a share in
            (0, 1) takes the smallest one rank at which that share of the merged update's energy ‖ΔW‖² is kept.
        weights: a number for each folder, 1 by default; what it does is the rule's to say.
        before: "norm", "pico": what is done to the updates first, in this order.
        after: "match", "svc", "lines": what is done to the merged update, in this order, "lines" last.
        seed: of rules that draw ("dare").
        output: folder to write, whole or not at all: adapter_config.json, adapter_model.safetensors,
            merge_report.json, and the adapters' tokenizer where they have one. None writes nothing; the result is in
            the report's `loras`.
        canonical: bring each adapter to its SVD gauge first, so that the result depends on what it computes only.
            False takes factors as they are, as the papers of "lego" and "robust" do; "slao" always does.
        model, prompts, tokenizer: the base model; {folder: texts}, a few dozen prompts of each adapter's task; None
            for the tokenizer that was saved with the first adapter, or the model's. With them "inputs" looks at what
            goes into the modules itself, and in each further pass again, under the merged adapter. The model stays as
            it is. Without data prompts="self": what each adapter writes itself, which is refused of one that has not
            learnt whole texts (128 of up to 256 tokens, drawn by `seed`).
        passes: with a model; 1 solves with what the adapters see on their own only.
        directions, last: with a model: kept of each input's covariance, and its share that is over last tokens alone.
        strength: with a model: the share of its scale at which each adapter is looked at on its own. Several: each is
            tried, and the merge whose answers to the prompts are nearest to the adapters' stays (of a model that
            writes no text: the first).
        distill: with a model that writes text, after any rule: steps in which the merged adapter learns to answer the
            prompts as each adapter does on its own, eight prompts each; takes the memory of a training run.
        learning_rate: of that. answer_tokens: the most tokens of an answer, of what is compared too.
        batch_size: with a model: prompts that go through it at a time.
        progress: show a bar; None: in a terminal.
        options: of the rule, by name: see its function; "ties": density (.2), "ties" and "dare": space ("core", or
            "full": on entries of ΔW, in memory for N dense weights of a module), "lines": beta (1), "svc": alpha (.1).

    Raises:
        ValueError: adapters that have no common sum, or a wrong argument; the message says what to do.
        FileExistsError: `output` exists.
    """
    check_arguments(rule, rank, before, after, options)
    own_words = isinstance(prompts, str) and prompts == "self"
    ok = prompts is None or isinstance(prompts, Mapping) or own_words
    check_field(ok, "prompts", prompts, "a mapping of each folder to its texts, or 'self'")
    check_field(is_int(seed), "seed", seed, "an integer")
    if output is not None:
        check_new(output)
    check_field(is_int(batch_size) and batch_size >= 1, "batch_size", batch_size, "an integer >= 1")
    strengths = check_looks(
        passes=passes, directions=directions, last=last, strength=strength, distill=distill,
        learning_rate=learning_rate, answer_tokens=answer_tokens, model=model,
    )  # fmt: skip
    adapters = Adapters(folders)
    weights = check_weights(weights, len(adapters))
    check_rule(rule, weights, options)
    used: dict[str, Any] = {}  # of the arguments that a model brings
    said: list[str] = []
    statistics: list[Statistics] = []
    look = None
    if (model is None) != (prompts is None) or (model is not None and rule != "inputs" and not distill):
        raise ValueError(
            "`model` and `prompts` go together, and with rule='inputs' or `distill`: the base model and {folder: "
            "texts} of every folder, or prompts='self'."
        )
    if distill and model is None:
        raise ValueError("`distill` learns from prompts: give `model` and `prompts`, or leave it out.")
    looks, seen = model is not None, "`model` and `prompts`"
    of_inputs = {"passes": passes, "directions": directions, "strength": tuple(strengths)}
    _check_used(looks and rule == "inputs", f"rule='inputs' with {seen}", of_inputs)
    _check_used(looks and rule == "inputs" and not own_words, f"rule='inputs' with {seen} of yours", {"last": last})
    _check_used(looks, seen, {"tokenizer": tokenizer, "batch_size": batch_size})
    _check_used(looks, f"`distill` with {seen}", {"learning_rate": learning_rate})
    _check_used(looks and not own_words, f"{seen} of yours", {"answer_tokens": answer_tokens})
    if model is not None and prompts is not None:
        kept = {"directions": directions, "last": 0.0 if own_words else last}
        texts = None if isinstance(prompts, str) else texts_of(prompts, adapters.folders)
        asked = answer_tokens if distill or len(strengths) > 1 else 0
        look = _Look(model, texts, tokenizer, batch_size, kept, adapters, asked, distill > 0, seed, progress)
        used |= {"prompts": "self"} if own_words else {}
    later = {step: {name: options[name] for name in options_of(AFTER[step]) if name in options} for step in after}
    tried: dict[float, list[float]] = {}
    if rule == "inputs":
        if look is not None:
            strengths = strengths if writes_text(look.model) else strengths[:1]
            used |= {"passes": passes, **kept}
        else:
            found = [Statistics.load(folder) for folder in adapters.folders]
            statistics = [one for one in found if one is not None]
            if len(statistics) < len(adapters):
                missing = [str(folder) for folder, one in zip(adapters.folders, found, strict=True) if one is None]
                if any(weight != 1 for weight in weights) or {"ridge", "floor"} & options.keys():
                    raise ValueError(
                        f"No input statistics in {listed(missing, 'and')}: without them rule='inputs', the default, "
                        "cannot do what `weights`, `ridge` and `floor` ask for. Write them (collect_inputs(model, "
                        "texts, folder)), give `model` and `prompts`, or name another rule, whose weights are factors."
                    )
                rule, needs = ("sum", {}) if len(adapters) < 3 else ("iso-c", {"factor": 2.0})
                how = f"rule={rule!r}{f' {needs}' if needs else ''}"
                options = needs | {name: options[name] for names in later.values() for name in names}
                if len(adapters) > 1:  # of one it is exact
                    said.append(
                        f"No input statistics in {listed(missing, 'and')}: merged by {how}, which keeps less of what "
                        "each adapter can do. collect_inputs(model, texts, folder) writes them; a run with "
                        "InputStatisticsCallback has them in its output_dir, from where they can be copied."
                    )
                statistics = []
    chosen = RULES[rule]
    gauge = canonical and rule != "slao"
    own = {name: value for name, value in options.items() if not any(name in given for given in later.values())}
    merge = _Merge(chosen, rank, weights, own, seed, statistics)

    extreme = f"weights={weights} and options={options} of rule={rule!r} lead out of float32: give less extreme ones"

    def updates(module: str) -> list[Lora]:
        found = adapters.updates(module, gauge)
        for step in before:
            found = BEFORE[step](found)
        return found

    def finished(lora: Lora, module: str) -> Lora:
        for step in after:
            if step != "lines":  # which is of all modules together
                lora = AFTER[step](lora, adapters.updates(module), **later[step])
        return lora

    def run() -> dict[str, Lora]:
        merged: dict[str, Lora] = {}
        with _solvable(extreme):
            merge.prepare(adapters, updates)
            for module in bar(adapters.sizes, rule, progress):
                merged[module] = single(finished(merge(module, updates(module)), module))
        if "lines" in after:
            merged = _lines(adapters, merged, **later["lines"])
        for module, factors in merged.items():
            check_finite(module, factors, "The merged update", extreme)
        return _cut_by_energy(merged, rank) if isinstance(rank, float) else merged

    answers = {} if own_words else {"answer_tokens": answer_tokens}

    def looked(look: _Look) -> dict[str, Lora]:
        """From each strength in all passes; of several, that whose answers are nearest to the adapters'."""
        nearest, best = math.inf, None
        for share in strengths:
            merge.statistics = look.alone(share)
            merged = run()
            for _ in range(passes - 1):
                merge.statistics = look.under(merged)
                merged = run()
            if len(strengths) == 1:
                used["strength"] = share
                return merged
            used.update(answers)
            tried[share] = look.divergences(merged)
            far = sum(weight * x for weight, x in zip(weights, tried[share], strict=True) if weight)
            if far < nearest:
                nearest, best, used["strength"] = far, (merged, merge.statistics), share
        if best is None:
            raise ValueError(
                "What the adapters or the merged one answer is not finite (NaN, inf), so that no strength is nearer: "
                "look at the base's dtype and at the adapters, or give one `strength`, which compares nothing."
            )
        merged, merge.statistics = best
        return merged

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = looked(look) if look is not None and rule == "inputs" else run()
        if look is not None and distill:
            used |= {"distill": distill, "learning_rate": learning_rate, **answers}
            counts = weights if rule == "inputs" else [1.0] * len(weights)
            merged = look.taught(merged, counts, seed, distill, learning_rate)
    said += dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning)
    if rule == "sum" and len(adapters) > 2:
        said.append(
            "The plain sum of three and more adapters is rarely any of them (of eight tasks: greedy accuracy .01, "
            "where the mean had .51): compare with rule='iso-c', or 'inputs'."
        )
    tokenizer_files, differ = adapters.tokenizer
    said += [differ] if differ else []
    for text in said:
        warnings.warn(text, stacklevel=2)
    report = _report(
        adapters, merged, weights, merge.statistics, progress,
        rule=rule, space=merge.space, ordered=chosen.ordered or distill > 0, before=list(before), after=list(after),
        options={**options, **used}, seed=seed, canonical=gauge, wanted_rank=rank, warnings=said, tried=tried,
    )  # fmt: skip
    if output is not None:

        def beside(folder: Path) -> None:
            report.save(folder)
            for path in tokenizer_files:
                shutil.copyfile(path, folder / path.name)

        write_lora(output, merged, saved=adapters.saved, beside=beside, **adapters.fields)
    return report


class _Look:
    """What goes into the modules on each adapter's prompts, and what it answers, with a model at hand."""

    def __init__(
        self,
        model: nn.Module,
        texts: list[Sequence[str]] | None,
        tokenizer: Any,
        batch_size: int,
        kept: dict[str, Any],
        adapters: Adapters,
        answer_tokens: int,
        distills: bool,
        seed: int,
        progress: bool | None,
    ) -> None:
        if isinstance(model, PeftModel):
            raise ValueError("`model` is a PeftModel: give the base model, onto which each adapter is put in turn.")
        for file in adapters.files:
            check_base(model, file)
        self.model, self.adapters, self.kept, self.batch_size = model, adapters, kept, batch_size
        self.answer_tokens, self.progress = answer_tokens, progress
        self.tokenizer = text_tokenizer(tokenizer or saved_tokenizer(model, adapters.folders[0]))
        open_end = writes_text(model)
        self.written = texts is None
        self.blocks = distillation.blocks_of(adapters.sizes) if distills and texts is not None else []
        if texts is None:
            self.prompts = []
            for folder in bar(adapters.folders, "texts", progress):
                with adapted(model, folder) as with_it:
                    self.prompts.append(own_texts(with_it, self.tokenizer, folder, batch_size, seed))
        else:
            self.prompts = [
                encoded(each, self.tokenizer, open_end=open_end, name=f"prompts[{str(folder)!r}]")
                for folder, each in zip(adapters.folders, texts, strict=True)
            ]
            check_length(model, list(chain(*self.prompts)), answer_tokens if open_end else 0)
        self.batches = [batches_of(prompts, batch_size) for prompts in self.prompts]

    def alone(self, strength: float) -> list[Statistics]:
        """Each under its own adapter, at a share of its scale."""
        found = []
        for file, batches in zip(self.adapters.files, self.batches, strict=True):
            with adapted(self.model, file.folder) as model:
                found.append(input_spreads(model, list(file.loras), batches, strengths=strength, **self.kept))
        return found

    def under(self, merged: dict[str, Lora]) -> list[Statistics]:
        """All under the merged adapter."""
        with self.onto(merged) as model:
            return [
                input_spreads(model, list(file.loras), batches, **self.kept)
                for file, batches in zip(self.adapters.files, self.batches, strict=True)
            ]

    @contextmanager
    def onto(self, merged: dict[str, Lora], trainable: bool = False) -> Iterator[PeftModel]:
        """The base with the merged adapter."""
        with tempfile.TemporaryDirectory() as folder:
            write_lora(Path(folder) / "merged", merged, saved=self.adapters.saved, **self.adapters.fields)
            with adapted(self.model, Path(folder) / "merged", trainable) as model:
                yield model

    @cached_property
    @torch.inference_mode(False)  # what is learnt from is no inference tensor, whatever the caller does
    def courses(self) -> list[list[distillation.Lesson]]:
        """What each adapter answers its prompts; of a text of its own, what it says of all but the first token."""
        found = []
        each = list(zip(self.adapters.folders, self.prompts, self.batches, strict=True))
        for folder, prompts, batches in bar(each, "answers", self.progress):
            check_text(self.model, batches, "give prompts without images, or leave `distill` out.")
            with adapted(self.model, folder) as model:
                if self.written:
                    lengths = [len(text) - 1 for text in prompts]
                    found.append(distillation.lessons_of(model, prompts, lengths, self.batch_size))
                else:
                    asked = (prompts, self.tokenizer, self.answer_tokens, self.batch_size, self.blocks)
                    found.append(distillation.lessons(model, *asked))
        return found

    def divergences(self, merged: dict[str, Lora]) -> list[float]:
        """How far what the merged adapter says is from what each adapter does."""
        courses = self.courses  # each adapter is on the base for its own; then the merged one is
        with self.onto(merged) as model:
            return distillation.divergences(model, courses, self.batch_size)

    def taught(
        self, merged: dict[str, Lora], weights: list[float], seed: int, distill: int, learning_rate: float
    ) -> dict[str, Lora]:
        """The merged adapter after `distill` steps on what each adapter answers, in its SVD gauge."""
        courses = self.courses
        with torch.inference_mode(False), torch.enable_grad(), self.onto(merged, trainable=True) as model:
            taught = distillation.distill(
                model, list(merged), courses, weights, steps=distill, learning_rate=learning_rate,
                blocks=self.blocks, batch_size=self.batch_size, seed=seed, progress=self.progress,
            )  # fmt: skip
        return {name: single(reduced(lora)) for name, lora in taught.items()}


class _Merge:
    """A rule with all that it is told, called a module at a time."""

    def __init__(
        self,
        rule: Rule,
        rank: str | int | float,
        weights: list[float],
        options: Mapping[str, Any],
        seed: int,
        statistics: list[Statistics],
    ) -> None:
        self.rule, self.weights, self.seed, self.statistics = rule, weights, seed, statistics
        self.rank = rank if isinstance(rank, int) else None  # None: all there is
        self.options = {name: value for name, value in options.items() if name not in ("space", "density")}
        if rule.merge is robust and "density" in options:
            self.options["density"] = options["density"]
        self.space = options.get("space", rule.space)
        self.density = options.get("density", 0.2)
        self.thresholds: list[float] = []
        self.digests: list[str] = []

    def prepare(self, adapters: Adapters, updates: Callable[[str], list[Lora]]) -> None:
        """What a rule needs to know of all modules: TIES in the core space keeps the largest entries of them all."""
        self.digests = adapters.digests
        if self.rule.merge is rules.ties and self.space == "core":
            entries: list[list[Tensor]] = [[] for _ in self.weights]
            for module in adapters.sizes:
                for mine, core in zip(entries, core_space(updates(module))[1], strict=True):
                    mine.append(core.abs().flatten())
            self.thresholds = [rules.density_threshold(torch.cat(mine), self.density) for mine in entries]

    def __call__(self, module: str, loras: list[Lora]) -> Lora:
        """The merged update in its SVD gauge, at most `rank`."""
        options = dict(self.options)
        if self.rule.merge is rules.dare:
            options["seeds"] = [
                int(hashlib.sha256(f"{self.seed}/{digest}/{module}".encode()).hexdigest()[:12], 16)
                for digest in self.digests
            ]
        if self.rule.space == "inputs":
            options["spreads"] = [one.of(module) for one in self.statistics]
        if self.rule.space in ("factors", "inputs"):
            every = max(1, sum(len(lora.A) for lora in loras))
            if self.rule.ranked:
                options["rank"] = self.rank or every
            return reduced(self.rule.merge(loras, self.weights, **options), self.rank)
        if self.space == "full":
            return self._full(loras, options)
        space, cores = core_space(loras)
        if self.rule.merge is rules.ties:
            options["thresholds"] = self.thresholds
        return to_lora(space, self.rule.merge(cores, self.weights, **options), self.rank)

    def _full(self, loras: list[Lora], options: dict[str, Any]) -> Lora:
        """Element by element on ΔW (O, I) in float32, a module at a time, as PEFT's `..._svd` combinations do."""
        deltas = [lora.B.float() @ lora.A.float() for lora in loras]
        if self.rule.merge is rules.ties:
            options["thresholds"] = [rules.density_threshold(delta.abs().flatten(), self.density) for delta in deltas]
        U, S, Vh = torch.linalg.svd(self.rule.merge(deltas, self.weights, **options).double(), full_matrices=False)
        k = self.rank or sum(len(lora.A) for lora in loras)
        return Lora(S[:k].sqrt()[:, None] * Vh[:k], U[:, :k] * S[:k].sqrt())


def check_arguments(
    rule: str, rank: Any, before: Sequence[str], after: Sequence[str], options: Mapping[str, Any]
) -> None:
    """What of `merge_adapters` can be checked without an adapter.

    Raises:
        ValueError: an argument is none, or an option none of the rule or of what comes after it.
    """
    check_field(isinstance(rule, str) and rule in RULES, "rule", rule, listed(map(repr, RULES)))
    ok = rank == "sum" or (is_int(rank) and rank >= 1) or (isinstance(rank, float) and 0 < rank < 1)
    check_field(ok, "rank", rank, "'sum', an integer >= 1, or a share of the energy in (0, 1)")
    for name, steps, known in (("before", before, BEFORE), ("after", after, AFTER)):
        ok = isinstance(steps, Sequence) and not isinstance(steps, str)
        ok = ok and all(isinstance(step, str) and step in known for step in steps)
        check_field(ok, name, steps, f"a list of {listed(map(repr, known))}")
    taken = RULES[rule].options() + [name for step in after for name in options_of(AFTER[step])]
    for name in options:
        if name not in taken:
            takes = f"takes {listed(taken, 'and')}" if taken else "takes no options"
            raise ValueError(f"rule={rule!r} {takes}, got {name}={options[name]!r}.")
    check_field(options.get("space", "core") in ("core", "full"), "space", options.get("space"), "'core' or 'full'")
    for name, above, most, wanted in (
        ("density", 0, 1, "a share in (0, 1]"),
        ("alpha", 0, math.inf, "a number > 0"),
        ("beta", -math.inf, math.inf, "a number"),
    ):
        value = options.get(name, 0.2)
        check_field(is_number(value) and above < value <= most, name, value, wanted)


def check_rule(rule: str, weights: list[float], options: Mapping[str, Any]) -> None:
    """Refuse weights and values of its own options that a rule does not take: it merges updates of one number.

    Args:
        options: all that there are; those of what comes after the rule are left alone.

    Raises:
        ValueError: as the rule says it.
    """
    own = {name: options[name] for name in RULES[rule].options() if name in options}
    if rule == "inputs":
        rules.check_losses(weights)
        check_system(**own)
        return
    merge = _Merge(RULES[rule], "sum", weights, own, 0, [])
    merge.digests, merge.thresholds = [""] * len(weights), [0.0] * len(weights)
    small = torch.full((1, 1), 1e-6, dtype=torch.float64)
    with suppress(torch.linalg.LinAlgError):  # extreme ones are the real updates' to judge
        merge("", [Lora(small, small)] * len(weights))


def check_looks(
    *, passes: int, directions: int, last: float, strength: Any, distill: int, learning_rate: float,
    answer_tokens: int, model: Any = None,
) -> list[float]:  # fmt: skip
    """Refuse arguments with which `merge_adapters` looks through a model, given or not; the strengths, each once.

    Raises:
        ValueError: naming the argument.
    """
    check_field(is_int(passes) and passes >= 1, "passes", passes, "an integer >= 1")
    strengths = check_strengths("strength", strength)
    check_looking(directions, last, strengths)
    distillation.check_lessons(model, distill, learning_rate, answer_tokens)
    return list(dict.fromkeys(strengths))


def _check_used(used: bool, by: str, given: Mapping[str, Any]) -> None:
    """Refuse arguments that change nothing in this merge, where they are not what they are by default."""
    defaults = inspect.signature(merge_adapters).parameters
    idle = [] if used else [name for name, value in given.items() if value != defaults[name].default]
    if idle:
        what = listed(idle, "and")
        raise ValueError(f"{what} would change nothing: what reads it is {by}. Give that, or leave it out.")


@contextmanager
def _solvable(instead: str) -> Iterator[None]:
    """A decomposition in this block that meets a number that is not finite is refused as the result would be."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"The merged update cannot be solved for ({error}): {instead}.") from error


def _cut_by_energy(merged: dict[str, Lora], share: float) -> dict[str, Lora]:
    """All modules at the smallest one rank that keeps the share of Σ ‖ΔW‖²; each is in its SVD gauge."""
    most = max(len(lora.A) for lora in merged.values())
    energy = torch.zeros(most, dtype=torch.float64)
    for A, B in merged.values():
        energy[: len(A)] += (A.double().norm(dim=1) * B.double().norm(dim=0)).square()
    rank = int((energy.cumsum(0) < share * energy.sum()).sum()) + 1
    return {name: Lora(A[:rank], B[:, :rank]) for name, (A, B) in merged.items()}


def _lines(adapters: Adapters, merged: dict[str, Lora], **options: Any) -> dict[str, Lora]:
    total = sum(
        scaling.sum_of_entries(Lora(torch.cat([A for A, _ in loras]), torch.cat([B for _, B in loras], dim=1)))
        for loras in map(adapters.updates, merged)
    )
    found = sum(map(scaling.sum_of_entries, merged.values()))
    alpha = total / (len(adapters) * found) if found else 0.0
    factors = scaling.lines({name: scaling.block_of(name) for name in merged}, alpha, **options)
    return {name: Lora(A, factors[name] * B) for name, (A, B) in merged.items()}


def _report(
    adapters: Adapters,
    merged: dict[str, Lora],
    weights: list[float],
    statistics: list[Statistics],
    progress: bool | None,
    **fields: Any,
) -> MergeReport:
    measures = Measures(len(adapters))
    missed = torch.zeros(len(adapters), dtype=torch.float64)  # E‖(ΔW - ΔW_t) x‖²
    energies = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)  # [t, s]: E‖ΔW_s x_t‖²
    for module in bar(merged, "report", progress):
        A, B = merged[module]
        loras, found = adapters.updates(module), Lora(A.double(), B.double())
        measures.add(loras, found)
        if statistics:
            spreads = [one.of(module) for one in statistics]
            energies += output_energies(loras, spreads)
            missed += torch.tensor([output_error(lora, found, C) for lora, C in zip(loras, spreads, strict=True)])
    tables = measures.tables()
    own = energies.diagonal()
    rows = [(row / one).sqrt().tolist() if one > 0 else None for row, one in zip(energies, own, strict=True)]
    entries = [
        Adapter(
            folder=str(file.folder),
            sha256=digest,
            weight=weight,
            rank=max(len(lora.A) for lora in file.loras.values()),
            modules=len(file.loras),
            norm=norm,
            share=share,
            kept=kept,
            output_error=float((error / energy).sqrt()) if energy > 0 else None,
        )
        for file, digest, weight, norm, share, kept, error, energy in zip(
            adapters.files,
            adapters.digests,
            weights,
            *(tables[x] for x in ("norms", "share", "kept")),
            missed,
            own,
            strict=True,
        )
    ]
    return MergeReport(
        rank=max([1, *(len(lora.A) for lora in merged.values())]),
        adapters=entries,
        norm=measures.merged**0.5,
        mean_norm=sum(tables["norms"]) / len(adapters),
        loras=merged,
        interference=rows if statistics else None,
        **{name: tables[name] for name in ("cosine", "rows", "columns")},
        **fields,
    )
