"""Which adapter is this prompt for? A router that needs no training, and answers "none" where no task is near.

    router = TaskRouter(model, tokenizer)
    router.add_task("helpdesk", prompts)        # a few training prompts; the adapter of that name is theirs
    router.attach()                             # forward and generate now choose by row, at the prompt

Features of the frozen base (task_features.py), a fit in closed form (task_scores.py), hooks that hand the choice to
the adapters' layers (task_driver.py). Each task keeps its own prompts' features and nothing else, so tasks come and go
in any order without the data of the others. Sources: LoraRetriever (arXiv 2402.09997) retrieves by similar prompts,
Any-SSR (arXiv 2503.13575) solves one ridge regression over all tasks' sums.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .base import BASE_ADAPTER
from .checks import check_field, is_indices, is_int, is_number
from .files import check_own, whole_folder
from .fingerprint import differences, fingerprint
from .inputs import base_of, check_length, check_text, device_of, eval_mode, load_tokenizer, text_tokenizer
from .lora_file import CONFIG, check_base_kept
from .lora_file import TENSORS as WEIGHTS
from .task_driver import Driver, Rows
from .task_features import HiddenStates, adapters_off, decoder_layers, pooled
from .task_scores import NONE, Scores


VERSION = 1
FILES = TENSORS, DESCRIPTION = "router.safetensors", "router.json"
CARD = "README.md"
ROUTED = CONFIG, WEIGHTS, CARD
DEPTH = 8 / 30  # layer 8 of SmolLM2-135M's 30: docs/routing.md has the others
BATCH = 8  # prompts at a time


class Routes(NamedTuple):
    """Of each prompt its task or "none", and (N, C) float64 probabilities of `TaskRouter.classes`."""

    names: list[str]
    probabilities: Tensor


class TaskRouter:
    """Chooses a task for a prompt, and drives adapters by it.

    Args:
        model: the base model, or a PeftModel on it, whose adapters are off while it is looked at. None where all that
            is added and routed are features.
        tokenizer: of the model; None loads it from where the model came from, when a text is to be read.
        layers: the hidden states to look at, counted from 1; one is enough. None is the layer at 8/30 of the depth.
        ridge: of the fit, as a share of the mean of the diagonal, > 0.
        false_alarms: prompts of a task that may be taken for unknown, as a share in [0, 1): what is as unfamiliar as
            that share of the tasks' own prompts is "none". 0 turns that off, but for what is likelier general text,
            where that was added.

    Raises:
        ValueError: an argument out of range, or a model without a list of layers.

    Example:
        >>> router = TaskRouter(model, tokenizer)
        >>> router.add_task("helpdesk", helpdesk_prompts[:64])
        >>> router.add_task("mood", mood_prompts[:64])
        >>> names, probabilities = router.route(["Subject: the printer. Which colleague takes this? Answer:"])
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        *,
        layers: int | Sequence[int] | None = None,
        ridge: float = 1e-2,
        false_alarms: float = 0.05,
    ) -> None:
        check_field(is_number(ridge) and ridge > 0, "ridge", ridge, "a number > 0")
        ok = is_number(false_alarms) and 0 <= false_alarms < 1
        check_field(ok, "false_alarms", false_alarms, "a number in [0, 1)")
        given = [layers] if is_int(layers) else layers
        ok = given is None or (is_indices(given) and len(given) > 0)  # type: ignore[arg-type]
        check_field(ok, "layers", layers, "layers as integers, or None")
        self.ridge, self.false_alarms = float(ridge), float(false_alarms)
        self.layers: list[int] | None = None if given is None else sorted(set(given))  # type: ignore[arg-type]
        self.rows: dict[str, Tensor] = {}  # class -> (n, D) float32 features of its prompts
        self.base: Any = None
        self.fingerprint: dict[str, Any] | None = None
        self.tokenizer = text_tokenizer(tokenizer)
        self.last: list[str] = []  # tasks of the rows of the batch that was routed last
        self._model: Any = None
        self._states: HiddenStates | None = None
        self._scores: Scores | None = None
        self._driver: Driver | None = None
        self._adapters: dict[str, str] = {}
        self._mode, self._none = "top1", True
        if model is not None:
            self._open(model)

    def _open(self, model: Any) -> None:
        base = base_of(model)
        if base is self.base:
            self._model = model
            return
        made_with = self.fingerprint or {}
        # A quarter of the words, which lm-eval never cuts off when it opens an adapter.
        words = made_with.get("vocab_size", base.get_input_embeddings().weight.shape[0] // 4)
        found = fingerprint(base, words)
        if differs := differences(made_with, found):
            raise ValueError(
                f"The router is of another base model ({', '.join(differs)}). Features of one model mean nothing to "
                "another: open it with the model that it was made with, or make a new TaskRouter(model) and add the "
                "tasks' prompts again."
            )
        if self.layers is None:
            self.layers = [max(1, round(DEPTH * len(decoder_layers(base))))]
        self._states = HiddenStates(base, self.layers)
        self._model, self.base, self.fingerprint = model, base, found

    # Tasks

    @property
    def tasks(self) -> list[str]:
        """In the order of their names."""
        return sorted(name for name in self.rows if name != NONE)

    @property
    def classes(self) -> list[str]:
        """The columns of the probabilities: the tasks, then "none" if general text was added."""
        return [*self.tasks, *([NONE] if NONE in self.rows else [])]

    def add_task(self, name: str, prompts: Any) -> None:
        """Learn where a task's prompts are. No other task's data is looked at, and none is changed.

        Args:
            name: of the task; where a router drives adapters, of its adapter. "none" is general text, which no adapter
                is for: it helps to tell what is unknown, and is not needed for it.
            prompts: texts as the model will get them, conversations (lists of role and content; the chat template is
                applied), or features (n, D): what `features` gives or rows of your own. 16 to 64 are enough.

        Raises:
            ValueError: the name is taken, there is no prompt or an empty one, or the features do not fit the others'.
        """
        ok = isinstance(name, str) and name not in ("", "__metadata__")  # which safetensors keeps for itself
        check_field(ok, "name", name, "a non-empty string, and not '__metadata__'")
        if name in self.rows:
            raise ValueError(f"The router has a task {name!r} already: router.remove_task({name!r}) first.")
        rows = self.features(prompts)
        if not len(rows):
            raise ValueError(f"Task {name!r} has no prompts: give a few of its training prompts, 16 to 64.")
        self._check_width(rows, f"of task {name!r}")
        self.rows[name] = rows
        self._scores = None

    def _check_width(self, rows: Tensor, whose: str) -> None:
        known = next(iter(self.rows.values()), rows)
        if known.shape[1] != rows.shape[1]:
            raise ValueError(
                f"The features {whose} have {rows.shape[1]} dimensions, those of the router's tasks "
                f"{known.shape[1]}: take all from the same base and layers, router.features(prompts)."
            )

    def remove_task(self, name: str) -> None:
        """Forget a task: the router is then, bit for bit, what it would be had the task never been added.

        Raises:
            ValueError: there is no such task.
        """
        if name not in self.rows:
            raise ValueError(f"The router has no task {name!r}; it has {self.tasks}.")
        del self.rows[name]
        self._scores = None

    def features(self, prompts: Any) -> Tensor:
        """(n, D) float32 on the CPU: the base's features of texts or conversations; features come back as they are.

        Raises:
            ValueError: a prompt is empty or has tokens that stand for images, a feature is not finite, or there is no
                model to look with.
        """
        if isinstance(prompts, Tensor):
            rows = prompts.detach().to("cpu", torch.float32)
            ok = rows.dim() == 2 and bool(rows.isfinite().all())
            check_field(ok, "prompts", tuple(rows.shape), "texts, or finite features of shape (prompts, dimensions)")
            return rows
        check_field(not isinstance(prompts, str), "prompts", prompts, "a list of prompts, not a single one")
        if self._states is None:
            raise ValueError(
                "This router has no model to read prompts with: TaskRouter(model, tokenizer), "
                "TaskRouter.load(folder, model, tokenizer), or give features."
            )
        ids = [self._ids(prompt, i) for i, prompt in enumerate(prompts)]
        check_length(self.base, ids)
        device = device_of(self.base)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found: dict[int, Tensor] = {}
        with eval_mode(self.base), adapters_off(self.base):
            for start in range(0, len(order), BATCH):
                part = order[start : start + BATCH]
                longest = len(ids[part[-1]])
                batch = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in part], device=device)
                mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in part], device=device)
                check_text(self.base, [{"input_ids": batch}], "give prompts without images.")
                states = self._states.of({"input_ids": batch, "attention_mask": mask})
                found.update(zip(part, pooled(states, mask), strict=True))
        rows = torch.stack([found[i] for i in range(len(ids))]) if ids else torch.zeros(0, 0)
        if not rows.isfinite().all():
            raise ValueError(
                "What the base makes of these prompts is not finite (NaN, inf), so that nothing can be told by it: "
                "look at the base's weights and dtype."
            )
        return rows

    def _ids(self, prompt: Any, number: int) -> list[int]:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.base.config.name_or_path)
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt).input_ids if prompt.strip() else []
        else:
            check_field(isinstance(prompt, list), f"prompts[{number}]", prompt, "a text or a list of messages")
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise ValueError(f"Prompt {number} is empty: there is nothing to route by. Leave it out.")
        return list(ids)

    # Routing

    @property
    def scores(self) -> Scores:
        """The fit over the tasks that are there now.

        Raises:
            ValueError: there is none.
        """
        if self._scores is None:
            if not self.tasks:
                raise ValueError("The router has no task yet: router.add_task(name, prompts).")
            with torch.device("cpu"):  # where the features are, whatever device new tensors are made on
                self._scores = Scores(self.rows, self.ridge)
        return self._scores

    def route(self, prompts: Any) -> Routes:
        """The task of each prompt, or "none".

        Args:
            prompts: as `add_task` takes them.

        Returns:
            `Routes(names, probabilities)`. The probabilities are of `classes`, as if the prompt were of one of them;
            whether it is of any is what `familiarity` says, and "none" in the names.

        Raises:
            ValueError: as `features`, there is no task, or the features do not fit the tasks'.
        """
        features = self.features(prompts)
        if not len(features):
            return Routes([], torch.zeros(0, len(self.classes), dtype=torch.float64))
        best, usual = self._likeliest(features)
        return Routes(self._names(best, usual), self.scores.probabilities(features))

    def familiarity(self, prompts: Any) -> Tensor:
        """(N,) float64: the share of the tasks' own prompts, each left out of the fit, that are as unfamiliar as this
        one. Below `false_alarms` a prompt is "none"."""
        features = self.features(prompts)
        return self._likeliest(features)[1] if len(features) else torch.zeros(0, dtype=torch.float64)

    def _likeliest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.scores
        self._check_width(features, "of these prompts")
        return scores.tasks_of(features)

    def _names(self, best: Tensor, usual: Tensor) -> list[str]:
        unknown = (usual < self.false_alarms) | (usual == 0)  # likelier general text, also where nothing else is none
        return [NONE if no else self.scores.names[i] for i, no in zip(best.tolist(), unknown.tolist(), strict=True)]

    # Driving adapters

    def attach(
        self, model: Any = None, *, adapters: Mapping[str, str] | None = None, mode: str = "top1", none: bool = True
    ) -> None:
        """From now on forward and generate of the model send each row through the adapter of its task.

        Args:
            model: the PeftModel, or a transformers model with adapters injected; None: what the router was made with.
            adapters: task -> what its rows are named in a mixed batch: an adapter's name, "adapter/task" for one task
                of a MORA adapter (as it was when it had learnt that one), or "__base__". Tasks that are not in it have
                an adapter of their own name, or are a task of a MORA adapter.
            mode: "top1", or "top2": the two likeliest tasks' adapters, weighted by their probabilities.
            none: whether rows of no task go to the base alone; False: to the likeliest task's adapter.

        Raises:
            ValueError: another base, a task without an adapter, adapters that take no names by row, or one that has
                changed the base (PiSSA).
        """
        check_field(mode in ("top1", "top2"), "mode", mode, "'top1' or 'top2'")
        model = model if model is not None else self._model
        if model is None:
            raise ValueError("There is no model to drive: router.attach(model).")
        before = None if self._driver is None else (self._model, self._adapters, self._mode, self._none)
        self.detach()
        try:
            self._drive(model, dict(adapters or {}), mode, none)
        except ValueError:
            if before is not None:  # as it was
                self._drive(*before)
            raise

    def _drive(self, model: Any, adapters: dict[str, str], mode: str, none: bool) -> None:
        self._open(model)
        there = getattr(self.base, "peft_config", {})
        assert self._states is not None
        driver = Driver(self.base, self._states, self._rows)
        try:
            names = self._row_names(driver.names(), adapters)
            driver.check(names.values())
            check_routable(there, {_adapter_of(row, there) for row in names.values()})
        except ValueError:
            driver.remove()
            raise
        self._driver, self._adapters, self._mode, self._none = driver, names, mode, none

    def detach(self) -> None:
        """Leave the model as it was without the router."""
        if self._driver is not None:
            self._driver.remove()
            self._driver = None

    def _row_names(self, there: set[str], given: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(given) - set(self.tasks))
        if unknown:
            raise ValueError(f"`adapters` names tasks that the router does not have: {unknown}; it has {self.tasks}.")
        found = {}
        for task in self.tasks:
            banks = sorted(name for name in there if name.partition("/")[2] == task)
            name = given.get(task, task if task in there or len(banks) != 1 else banks[0])
            if name != BASE_ADAPTER and name not in there:
                raise ValueError(
                    f"Task {task!r} has no adapter {name!r} on this model, which has {sorted(there)}. Load it "
                    f"(model.load_adapter(folder, {task!r})), say which one it is "
                    f"(router.attach(model, adapters={{{task!r}: ...}})), or router.remove_task({task!r})."
                )
            found[task] = name
        return found

    def _rows(self, features: Tensor) -> Rows:
        """What the driver asks at each batch of prompts."""
        assert self._driver is not None
        there = self._driver.names()
        if missing := [t for t in self.tasks if self._adapters.get(t) not in {*there, BASE_ADAPTER}]:
            raise ValueError(
                f"Tasks {missing} of the router have no adapter on the model (any more), which has {sorted(there)}: "
                "router.remove_task(...) where it was deleted, or load it and call router.attach() again."
            )
        scores, tasks = self.scores, self.tasks
        best, usual = self._likeliest(features)
        self.last = self._names(best, usual) if self._none else [scores.names[i] for i in best.tolist()]
        first = [BASE_ADAPTER if name == NONE else self._adapters[name] for name in self.last]
        if self._mode == "top1" or len(tasks) == 1:
            return Rows(first)
        likely = scores.probabilities(features)[:, : len(tasks)]
        two = likely.topk(2, dim=1)
        second = [
            name if name == BASE_ADAPTER else self._adapters[tasks[i]]
            for name, i in zip(first, two.indices[:, 1].tolist(), strict=True)
        ]
        return Rows(first, second, two.values[:, 0] / two.values.sum(dim=1))

    # Files

    def _text(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "model": self.fingerprint,
            "layers": self.layers,
            "ridge": self.ridge,
            "false_alarms": self.false_alarms,
            "tasks": {name: len(self.rows[name]) for name in sorted(self.rows)},
        }

    @classmethod
    def _from_text(cls, text: Mapping[str, Any], rows: Mapping[str, Tensor]) -> TaskRouter:
        if text["version"] != VERSION:
            raise ValueError(f"The router has version {text['version']}, this release reads {VERSION}.")
        router = cls(layers=text["layers"], ridge=text["ridge"], false_alarms=text["false_alarms"])
        router.fingerprint = text["model"]
        router.rows = {name: rows[name].float() for name in text["tasks"]}
        if any(len(router.rows[name]) != n for name, n in text["tasks"].items()):
            raise ValueError("The router's features and its description are not of the same save.")
        for name, found in router.rows.items():
            if not len(router.features(found)):
                raise ValueError(f"The router's task {name!r} has no rows.")
            router._check_width(found, f"of task {name!r}")
        return router

    def save(self, folder: str | Path) -> None:
        """Write FOLDER/router.safetensors, the tasks' features, and FOLDER/router.json, in place of an earlier save.

        Raises:
            FileExistsError: the folder holds other files.
        """
        check_own(folder, FILES)
        with whole_folder(folder, replace=True) as written:
            save_file({name: rows.contiguous() for name, rows in self.rows.items()}, written / TENSORS)
            (written / DESCRIPTION).write_text(json.dumps(self._text(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, model: Any = None, tokenizer: Any = None) -> TaskRouter:
        """What `save` wrote; it routes as the saved one did, bit for bit.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files are no router, or `model` is not the base that it was made with.
        """
        folder = Path(folder)
        for name in (TENSORS, DESCRIPTION):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing: a router is a folder that TaskRouter.save wrote."
                )
        try:
            text = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            router = cls._from_text(text, load_file(folder / TENSORS))
        except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError,
                SafetensorError) as error:  # fmt: skip
            raise ValueError(f"{folder} does not hold a router: {type(error).__name__}: {error}.") from error
        router.tokenizer = text_tokenizer(tokenizer)
        if model is not None:
            router._open(model)
        return router

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the attached model's adapters and the router as one folder that PEFT opens as it opens an adapter, and
        with it `pipeline` and plain lm-eval; the model that comes out is driven by the router. An earlier save there
        is replaced, a README.md beside it kept.

        Raises:
            ValueError: the router is not attached with the tasks that it has now, or an adapter brings whole modules
                or tokens of its own.
            FileExistsError: as `check_routed`.
        """
        check_routed(folder)
        if self._driver is None:
            raise ValueError("Only a router that drives adapters can be saved with them: router.attach(model) first.")
        if set(self.tasks) != set(self._adapters):
            raise ValueError(
                f"The router has the tasks {self.tasks}, and was attached with {sorted(self._adapters)}: call "
                "router.attach() again, which finds an adapter for each, and then save."
            )
        names = sorted({row for row in self._adapters.values() if row != BASE_ADAPTER})
        if not names:
            raise ValueError(
                f"Every task is for the base alone ({BASE_ADAPTER!r}), so that there is no adapter to save: "
                "router.save(folder) keeps the router."
            )
        used = {row: _adapter_of(row, self.base.peft_config) for row in names}
        # "default" is what whoever opens the folder calls the whole of it.
        free = (name for name in chain(["adapter"], map("adapter{}".format, count(2))) if name not in used.values())
        saved = {name: next(free) if name == "default" else name for name in set(used.values())}
        tensors: dict[str, Tensor] = {}
        configs: dict[str, Any] = {}
        check_saved({name: self.base.peft_config[name] for name in saved})
        for name, new in sorted(saved.items()):
            config = self.base.peft_config[name]
            prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
            for key, tensor in self.base.state_dict().items():
                bare = _without_adapter(key, prefix, name)
                if bare is not None:
                    tensors[f"base_model.model.{_with_adapter(bare, prefix, new)}"] = tensor.cpu().contiguous()
            configs[new] = _as_json(config)
        rows = {
            task: row if row == BASE_ADAPTER else saved[used[row]] + row.removeprefix(used[row])
            for task, row in self._adapters.items()
        }
        every = torch.cat([self.rows[name] for name in sorted(self.rows)])
        # As integers: loaders and model.half() round what is float, and the routes would not be the same bit for bit.
        tensors["base_model.model.task_router.features"] = every.view(torch.int32).clone()
        first = self.base.peft_config[used[names[0]]]
        config = TaskRouterConfig(
            adapters=configs, rows=rows, router=self._text(), mode=self._mode, none=self._none,
            task_type=first.task_type, base_model_name_or_path=self.base.config.name_or_path,
            revision=first.revision, inference_mode=True,
        )  # fmt: skip
        if config.task_type is None:
            auto = {"base_model_class": type(self.base).__name__, "parent_library": type(self.base).__module__}
            config.auto_mapping = auto
        with whole_folder(folder, replace=True) as written:
            save_file(tensors, written / WEIGHTS, {"format": "pt"})
            config.save_pretrained(str(written), auto_mapping_dict=config.auto_mapping)
            if (card := Path(folder, CARD)).exists():
                shutil.copy(card, written / CARD)

    @staticmethod
    def of(model: Any) -> TaskRouter:
        """The router that drives a model which was opened from a folder of `save_pretrained`.

        Raises:
            ValueError: there is none.
        """
        for module in model.modules():
            if isinstance(module, RouterInModel):
                return module.router
        raise ValueError("No router came with this model: TaskRouter.load(folder, model), then attach().")


def check_routed(folder: str | Path) -> None:
    """Refuse a folder that `save_pretrained` would delete more of than an earlier save.

    Raises:
        FileExistsError: it holds other files, or is an adapter's.
    """
    check_own(folder, ROUTED)
    config = Path(folder, CONFIG)
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    if TaskRouterConfig.method not in text and (text or Path(folder, WEIGHTS).exists()):
        raise FileExistsError(f"{folder} holds an adapter, which would be deleted: give a folder of its own.")


def _adapter_of(row: str, adapters: Iterable[str]) -> str:
    """The adapter that a row of this name goes through; a task's name may have a "/", as an adapter's. "" is none."""
    return max((name for name in adapters if f"{row}/".startswith(f"{name}/")), key=len, default="")


def check_routable(configs: Mapping[str, Any], driven: Container[str] = ()) -> None:
    """Refuse adapters on a model beside which rows of others, and of none, are not what they are alone, and those that
    are to be driven and take no rows.

    Args:
        configs: name -> PeftConfig, or what its file says.
        driven: names of those that rows go through.

    Raises:
        ValueError: naming the adapter and what to do.
    """
    check_base_kept(configs)
    for name, config in configs.items():
        said = config if isinstance(config, Mapping) else vars(config)
        if said.get("bias", "none") != "none":
            raise ValueError(
                f"Adapter {name!r} has trained the base's own biases (bias={said['bias']!r}), through which rows of "
                "others, and of none, would go too. Train it with bias='none'."
            )
        # Modules with adapted parameters take no rows, whichever adapter they are of.
        for field_name in ("target_parameters", *(["use_dora"] if name in driven else [])):
            if said.get(field_name):
                raise ValueError(
                    f"Adapter {name!r} has {field_name}={said[field_name]!r}, for which PEFT computes no batch of "
                    "rows with adapters of their own. Take one prompt at a time: "
                    "model.set_adapter(router.route([prompt]).names[0]); or train it without."
                )


def check_saved(configs: Mapping[str, Any]) -> None:
    """Refuse adapters that a folder with their router does not hold as they are.

    Raises:
        ValueError: naming the adapter and what to do.
    """
    for name, config in configs.items():
        said = config if isinstance(config, Mapping) else vars(config)
        for field_name in ("modules_to_save", "trainable_token_indices", "alora_invocation_tokens"):
            if said.get(field_name):
                raise ValueError(
                    f"Adapter {name!r} has {field_name}={said[field_name]!r}, which a routed folder does not hold. "
                    "Save the adapters one by one and the router with router.save(folder); attach it after loading."
                )


def _without_adapter(key: str, prefix: str, name: str) -> str | None:
    """Of a state dict's key that is of this adapter, the key without the adapter's name; None: it is not."""
    module, found, rest = key.rpartition(f".{prefix}")
    kind, dot, end = rest.partition(".")
    if not found or not dot or not (end == name or end.startswith(f"{name}.")):
        return None
    return f"{module}{found}{kind}{end.removeprefix(name)}"


def _with_adapter(bare: str, prefix: str, name: str) -> str:
    module, found, rest = bare.rpartition(f".{prefix}")
    kind, dot, end = rest.partition(".")
    return f"{module}{found}{kind}.{name}{dot}{end}"


def _as_json(config: PeftConfig) -> dict[str, Any]:
    """As PEFT writes it."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        found = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    return {**found, "inference_mode": True}


# The folder of several adapters and their router, as PEFT sees it


@dataclass
class TaskRouterConfig(PeftConfig):
    """Config of a folder that `TaskRouter.save_pretrained` wrote."""

    method: ClassVar[str] = "TASK_ROUTER"

    adapters: dict[str, Any] = field(default_factory=dict, metadata={"help": "Name -> the adapter's own config."})
    rows: dict[str, str] = field(default_factory=dict, metadata={"help": "Task -> name of its rows in a mixed batch."})
    router: dict[str, Any] = field(default_factory=dict, metadata={"help": "What router.json has."})
    mode: str = field(default="top1", metadata={"help": "'top1' or 'top2'."})
    none: bool = field(default=True, metadata={"help": "Whether rows of no task go to the base alone."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method)


class RouterInModel(nn.Module):
    """A child of the base model that holds the router's features, so that they load as weights do."""

    def __init__(self, config: TaskRouterConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        text = config.router
        rows = sum(text["tasks"].values())
        features = torch.zeros(rows, hidden_size * len(text["layers"]), dtype=torch.int32)
        self.register_buffer("features", features)
        self.driver: Driver | None = None
        self._router: TaskRouter | None = None

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of a base whose adapters were unloaded."""
        if self.driver is None or not self.driver.is_over():
            super()._save_to_state_dict(*args, **kwargs)

    @property
    def router(self) -> TaskRouter:
        """Made when first asked for, by when the features are loaded."""
        if self._router is None:
            assert self.driver is not None
            text = self.config.router
            values: Any = self.features
            values = values.cpu().clone().view(torch.float32)  # torch.save wants one dtype of a storage
            rows = dict(
                zip(
                    sorted(text["tasks"]), values.split([text["tasks"][n] for n in sorted(text["tasks"])]), strict=True
                )
            )
            router = TaskRouter._from_text(text, rows)
            router.base = router._model = self.driver.base
            router._states, router._driver = self.driver.states, self.driver
            router._adapters, router._mode, router._none = self.config.rows, self.config.mode, self.config.none
            self._router = router
        return self._router

    def choose(self, features: Tensor) -> Rows:
        return self.router._rows(features)


def _refuse_second(config: Any) -> None:
    if isinstance(config, TaskRouterConfig):  # not what add_weighted_adapter makes of the adapters that are there
        raise ValueError(
            "A model that was opened from a folder of adapters and their router takes no second one. Open the "
            "adapters one by one, add the tasks to one router (router.add_task), attach and save that."
        )


class TaskRouterModel:
    """What PEFT makes of a `TaskRouterConfig`: the adapters' own tuner, with all of them, and the router's hooks."""

    prefix: ClassVar[str] = "task_router_"
    uses_shared_state: ClassVar[bool] = False

    def __new__(cls, model: Any, peft_config: Any, adapter_name: str, **kwargs: Any) -> Any:
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        if not config.inference_mode:
            raise ValueError(
                "A folder of adapters and their router is for inference. To go on training, open the adapter that it "
                "was made of, or save one: model.save_pretrained(folder, selected_adapters=[name])."
            )
        if adapter_name in config.adapters:
            raise ValueError(
                f'The folder has an adapter named {adapter_name!r}: open it under another name, adapter_name="routed".'
            )
        check_routable(config.adapters, config.adapters)
        check_saved(config.adapters)
        probe = TaskRouter._from_text({**config.router, "tasks": {}}, {})
        probe._open(model)  # refuses another base
        assert probe._states is not None
        tuner: Any = None
        for name, entry in config.adapters.items():
            own: Any = PeftConfig.from_peft_type(**entry)
            own.inference_mode = True
            if tuner is None:
                tuner = PEFT_TYPE_TO_TUNER_MAPPING[own.peft_type](model, {name: own}, name)
            else:
                tuner.peft_config[name] = own
                tuner.inject_adapter(model, name)
            tuner._cast_adapter_dtype(name, autocast_adapter_dtype=True)
        layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer.requires_grad_(False)
        tuner.peft_config[adapter_name] = config
        tuner._check_new_adapter_config = _refuse_second  # the first of what PEFT asks of an adapter that comes
        # Of the states between layers; embeddings are narrower in some models, which then widen them (OPT-350m).
        width = config.router["model"]["hidden_size"] or model.get_input_embeddings().weight.shape[1]
        holder = RouterInModel(config, width)
        model.task_router = holder
        holder.driver = Driver(model, probe._states, holder.choose)
        return tuner

    @classmethod
    def _get_adapter_state_dict(cls, **_: Any) -> dict[str, Tensor]:
        raise ValueError(
            "An opened folder of adapters and their router is saved by its router, "
            "TaskRouter.of(model).save_pretrained(folder); one of its adapters by "
            "model.save_pretrained(folder, selected_adapters=[name])."
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Each adapter's tensors as its own method fits them to its layers.

        Raises:
            ValueError: the file lacks the tensors of an adapter, or the router's.
        """
        left = dict(state_dict)
        if not any(key.endswith("task_router.features") for key in left):
            raise ValueError("The file has no features of the router: it is damaged, or of another folder.")
        fitted: dict[str, Tensor] = {}
        for name in config.adapters:
            own = model.peft_config[name]
            prefix = PEFT_TYPE_TO_PREFIX_MAPPING[own.peft_type]
            bare = {key: _without_adapter(key, prefix, name) for key in left}
            found = {new: left.pop(key) for key, new in bare.items() if new is not None}
            if not found:
                raise ValueError(f"The file has no tensors of adapter {name!r}: it is damaged, or of another folder.")
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[own.peft_type]
            fitted |= tuner._remap_adapter_state_dict_for_load(
                model=model, config=own, adapter_name=name, state_dict=found
            )
        return {**left, **fitted}
