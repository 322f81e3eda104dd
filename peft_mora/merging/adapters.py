"""What comes in: several folders, read and found to be of one base model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_field, is_number, listed
from ..lora_file import Lora, LoraFile, digest, read_lora
from .core import canonical


# Of a tokenizer; the first is always there.
TOKENIZER = (
    "tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip
PASSING = {"truncation", "padding", "padding_side", "truncation_side", "name_or_path"}  # of a use, not of the tokens


class Adapters:
    """N adapters over one base model.

    Args:
        folders: as `read_lora` takes them.

    Raises:
        ValueError: none, or as `read_lora` and `check_together`, or a damaged tokenizer beside one.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        check_field(
            isinstance(folders, Sequence) and not isinstance(folders, str) and len(folders) > 0,
            "folders",
            folders,
            "a list of folders, at least one",
        )
        for folder in folders:
            check_field(isinstance(folder, str | os.PathLike), "folders[...]", folder, "the folder of an adapter")
        places = [Path(folder).resolve() for folder in folders]
        if twice := next((place for place in places if places.count(place) > 1), None):
            raise ValueError(f"`folders` has {twice} twice: give it once, and a weight if it is to count for more.")
        self.files = [read_lora(folder) for folder in folders]
        self.fields, self.saved = check_together(self.files)
        self.digests = [digest(file.folder) for file in self.files]
        self.tokenizer = self._read_tokenizer()  # what is wrong with it is said before the work
        # module -> (O, I), in the order of the first file that has it
        self.sizes = {name: (len(B), A.shape[1]) for file in self.files for name, (A, B) in file.loras.items()}

    def __len__(self) -> int:
        return len(self.files)

    @property
    def folders(self) -> list[Path]:
        return [file.folder for file in self.files]

    def updates(self, module: str, gauge: bool = False) -> list[Lora]:
        """ΔW_t of one module in float64, of rank 0 where an adapter lacks it; in the SVD gauge if asked for."""
        found = []
        for file in self.files:
            A, B = file.loras.get(module) or self._nothing(module)
            lora = Lora(A.double(), B.double())
            found.append(canonical(lora) if gauge else lora)
        return found

    def _read_tokenizer(self) -> tuple[list[Path], str]:
        """The files of the tokenizer that was saved with the adapters, of those that have one; [] where none has, or
        they have different ones, with what to say of that."""
        own = [folder for folder in self.folders if (folder / TOKENIZER[0]).is_file()]
        files = [{name: folder / name for name in TOKENIZER if (folder / name).is_file()} for folder in own]
        contents = [{name: _content(path) for name, path in found.items()} for found in files]
        if differs := next((i for i, found in enumerate(contents) if found != contents[0]), None):
            return [], (
                f"{own[0]} and {own[differs]} hold different tokenizers or chat templates, so that none is written "
                "beside the merged adapter: copy the one that its prompts are made with there."
            )
        return [*files[0].values()] if files else [], ""

    def _nothing(self, module: str) -> Lora:
        O, I = self.sizes[module]  # noqa: E741
        return Lora(torch.zeros(0, I), torch.zeros(O, 0))


def check_weights(weights: Sequence[float] | None, adapters: int) -> list[float]:
    """One number an adapter; 1 by default.

    Raises:
        ValueError: another count, or a value that is no finite number.
    """
    if weights is None:
        return [1.0] * adapters
    several = isinstance(weights, Sequence) and not isinstance(weights, str)
    check_field(several, "weights", weights, "a list of numbers, one an adapter")
    for weight in weights:
        check_field(is_number(weight), "weights", weights, "finite numbers")
    if len(weights) != adapters:
        raise ValueError(f"{adapters} adapters need {adapters} weights, got {len(weights)}.")
    return [float(weight) for weight in weights]


def _content(path: Path) -> Any:
    """What a tokenizer's file says, but for how it was used last."""
    if path.suffix != ".json":
        return path.read_bytes()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and Unicode's
        raise ValueError(
            f"{path} is damaged ({error}): save the tokenizer there again (tokenizer.save_pretrained), or delete its "
            "files."
        ) from error
    return {key: value for key, value in found.items() if key not in PASSING} if isinstance(found, dict) else found


def check_together(files: Sequence[LoraFile]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of the merged LoRA's config, and the tensors of `modules_to_save`.

    Raises:
        ValueError: the adapters are of other base models or tasks, a module has other shapes, or modules that are
            saved in full differ.
    """
    fields: dict[str, Any] = {}
    for key, advice in (
        ("base_model_name_or_path", "Updates of one model mean nothing to another. If it is one model under two "
         "names, write one of them into each adapter_config.json."),
        ("revision", "Train them on one revision, or write the same one into each adapter_config.json."),
        ("task_type", "Merge adapters for one task type."),
    ):  # fmt: skip
        values = {file.config[key]: file.folder for file in files if file.config.get(key)}
        if len(values) > 1:
            shown = listed((f"{value!r} ({folder})" for value, folder in values.items()), "and")
            raise ValueError(f"The adapters have different {key}: {shown}. {advice}")
        fields[key] = next(iter(values), None)
    first: dict[str, tuple[LoraFile, tuple[int, int]]] = {}
    for file in files:
        for name, (A, B) in file.loras.items():
            other, shape = first.setdefault(name, (file, (len(B), A.shape[1])))
            if shape != (len(B), A.shape[1]):
                raise ValueError(
                    f"Module {name!r} is {shape[0]} x {shape[1]} in {other.folder} and {len(B)} x {A.shape[1]} in "
                    f"{file.folder}: these adapters are of different base models."
                )
    saved = files[0].saved
    for file in files[1:]:
        same = file.saved.keys() == saved.keys() and all(torch.equal(t, saved[key]) for key, t in file.saved.items())
        if not same:
            raise ValueError(
                f"modules_to_save of {files[0].folder} and {file.folder} differ, and what is saved in full has no "
                "sum. Train the adapters without modules_to_save, or from one set of such weights that stays frozen."
            )
    targets = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    first_config = files[0].config
    alike = all(
        file.loras.keys() == files[0].loras.keys()
        and all(_same(file.config.get(key), first_config.get(key)) for key in targets)
        for file in files
    )  # fmt: skip
    if alike:
        fields |= {key: files[0].config.get(key) for key in targets}
    if files[0].saved:
        fields["modules_to_save"] = files[0].config["modules_to_save"]
    fields["fan_in_fan_out"] = any(file.config.get("fan_in_fan_out") for file in files)
    mapping = files[0].config.get("auto_mapping")
    fields["auto_mapping"] = mapping if all(file.config.get("auto_mapping") == mapping for file in files) else None
    return fields, saved


def _same(value: Any, other: Any) -> bool:
    """Equal fields of two configs, lists in any order."""
    return sorted(value) == sorted(other) if isinstance(value, list) and isinstance(other, list) else value == other
