"""What an adapter saw while it was trained, beside it when it is saved: a merge that needs nothing else.

C = E[x xᵀ] of each module's inputs over some training prompts, at the end of training, as `collect_inputs` finds it
afterwards: `peft_mora.merging` merges folders that hold it by least squares (rule="inputs") without a model or data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_mora import use_exact_4bit_kernels
from peft_mora.checks import check_field, is_int
from peft_mora.inputs import batches_of, check_text, shared_inputs
from peft_mora.lora_file import TENSORS, digest, read_lora
from peft_mora.merging.inputs import STRENGTHS, check_looking, input_spreads, submodules

from .host import HostCallback, behind_ours, calibration_batches, callbacks_that, keep_stopped, output_folder


LENGTH = 1024  # tokens of one prompt, the last ones


class InputStatisticsCallback(HostCallback):
    """Write input_statistics.safetensors where the trainer saves the adapter, for `merge_adapters(rule="inputs")`.

    For whatever `merge_adapters` takes: LoRA, LORI, FURINA, MORA with routing "dense". Of each record it sees the
    prompt: what stands before the first token that the loss counts, or all of a record that is learnt from its first
    token on. The file holds, in 16 bits, `directions` directions of I numbers for each distinct input of I, and their
    strengths; nothing of the records themselves. It is bound to the weights by a hash, and is there whole or not at
    all. A resumed run writes the same one at its end.

    Args:
        directions: leading directions of each module's inputs; the others have one mean. 32 are enough.
        prompts: training records to look at, drawn from the run's seed.
        last: share of C that is over last tokens of prompts alone, 0..1.
        strengths: shares of its scale that the adapter has meanwhile, 0..1, one after the other; C is the mean over
            them: what a module gets under a merged adapter lies among these.
        adapter_name: which adapter; None is the one in training.

    Raises:
        ValueError: on construction for a wrong argument; at the start of training for an adapter that no merge takes,
            a model that transformers has put one inside, or batches in which prompts cannot be seen.

    Example:
        >>> trainer = SFTTrainer(..., args=SFTConfig("out/maths"), callbacks=[InputStatisticsCallback()])
        >>> trainer.train()
        >>> trainer.save_model()
        >>> merge_adapters(["out/maths", "out/code"], rank=16, output="out/both")
    """

    def __init__(
        self,
        directions: int = 32,
        *,
        prompts: int = 64,
        last: float = 0.5,
        strengths: float | Sequence[float] = STRENGTHS,
        adapter_name: str | None = None,
    ) -> None:
        check_looking(directions, last, strengths)
        check_field(is_int(prompts) and prompts >= 1, "prompts", prompts, "an integer >= 1")
        self.directions, self.prompts, self.last, self.strengths = directions, prompts, last, strengths
        self.adapter_name = adapter_name
        self._batches: list[dict[str, Tensor]] = []

    def refusals(self) -> dict[str, str]:
        message = "shards what a forward outside of the training loop needs. Train without InputStatisticsCallback, "
        message += "and call peft_mora.merging.collect_inputs(model, prompts, folder) on the saved adapter."
        return {"deepspeed": f"DeepSpeed {message}", "fsdp": f"FSDP {message}"}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        super().on_train_begin(args, state, control)
        if not hasattr(model, "get_base_model"):
            raise ValueError(
                "InputStatisticsCallback looks at a PEFT model, and this one has its adapter inside (transformers' "
                "add_adapter). Give the trainer a peft_config, or a model from get_peft_model; or call "
                "peft_mora.merging.collect_inputs(model, prompts, folder) on the saved adapter."
            )
        behind_ours(self)  # they may move the weights at the run's end, and the file is of those that are saved
        self._name = self.adapter_name or in_training(model)
        try:
            with saved(model, self._name) as folder:
                loras = read_lora(folder).loras
        except ValueError as error:
            raise ValueError(
                f"No merge takes this adapter, so that it needs no InputStatisticsCallback: {error}"
            ) from error
        if "LoriCalibrationCallback" in callbacks_that("replaces_weights") and any(
            len(lora.A) < 8 for lora in loras.values()
        ):
            raise ValueError(
                "The run packs B of a LORI of less than rank 8 (LoriCalibrationCallback), whose rows a merge cannot "
                "tell without the base model. Train it at r >= 8, or without InputStatisticsCallback, and export it "
                "(peft-mora export) before peft_mora.merging.collect_inputs."
            )
        modules = list(loras)
        otherwise = "Call peft_mora.merging.collect_inputs(model, prompts, folder) on the saved adapter instead."
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"An encoder-decoder's prompts do not go into its decoder. {otherwise}")
        use_exact_4bit_kernels(model)
        if not state.is_world_process_zero:  # which alone looks
            return
        count = -(-self.prompts // args.per_device_train_batch_size)
        prompts = [
            prompt
            for batch in calibration_batches(train_dataloader, args, count, otherwise)()
            for prompt in prompts_of(batch)
        ]
        self._batches = batches_of(prompts[: self.prompts], args.per_device_train_batch_size)
        # Now, not when all is learnt: prompts with images, and a module that sees no input.
        check_text(model, self._batches, "train without InputStatisticsCallback, and merge by a rule without inputs.")
        shared_inputs(model, submodules(model, modules), self._batches[0])

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        batches, self._batches = self._batches, []
        if not args.load_best_model_at_end and callable(getattr(optimizer, "eval", None)):
            optimizer.eval()  # a schedule-free one: the weights as an evaluation leaves them, and as they are saved
        wrong = ""
        if batches:
            try:
                with saved(model, self._name) as folder:
                    modules, weights = list(read_lora(folder).loras), digest(folder)
                statistics = input_spreads(
                    model, modules, batches, directions=self.directions, last=self.last, strengths=self.strengths
                )
                folder = output_folder(args) / ("" if self._name == "default" else self._name)
                folder.mkdir(parents=True, exist_ok=True)
                print(f"what the adapter saw: {statistics.save(folder, weights)}, for peft_mora.merging")
            except Exception as error:  # a full disk, no memory for a look: all that was learnt is kept
                found = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}."
                wrong = f"{found} The adapter is in {keep_stopped(model, args, state, alone=True)}."
        if dist.is_available() and dist.is_initialized():  # all processes end alike
            told = [wrong]
            dist.broadcast_object_list(told)
            (wrong,) = told
        if wrong:
            raise ValueError(wrong)


def prompts_of(batch: Mapping[str, Any]) -> Iterator[Tensor]:
    """Token ids (n,) int64 of each record's prompt in a batch of a language model's trainer.

    Args:
        batch: input_ids (B, S); attention_mask (B, S), 0 on padding; labels (B, S), -100 where nothing is learnt
            (others, as a classifier's (B,), say nothing of tokens: a row is a prompt), or completion_mask (B, S), 1
            where an answer is (preference trainers, where a prompt comes with each of its answers: it counts once);
            position_ids (B, S), which begin again at 0 where one row holds several records.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    labels, answers = batch.get("labels"), batch.get("completion_mask")
    wanted: Tensor | None = None  # where something is learnt
    if labels is not None and labels.shape == ids.shape:
        wanted = labels != -100
    elif answers is not None:
        wanted = answers.bool()
    seen: set[tuple[int, ...]] = set()
    positions = batch.get("position_ids")
    for row in range(len(ids)):
        real = (
            mask[row].bool() if mask is not None and mask.dim() == 2 else torch.ones_like(ids[row], dtype=torch.bool)
        )
        starts = positions[row][real] == 0 if positions is not None else torch.zeros(int(real.sum())).bool()
        cuts = [0, *(starts.nonzero().flatten().tolist()), int(real.sum())]
        for start, end in pairwise(cuts):
            record = ids[row][real][start:end]
            learnt = wanted[row][real][start:end] if wanted is not None else torch.ones_like(record).bool()
            first = int(learnt.int().argmax()) if learnt.any() else len(record)
            prompt = record[:first] if first else record
            again = labels is None and tuple(prompt.tolist()) in seen
            seen.add(tuple(prompt.tolist()))
            if len(prompt) and not again:
                yield prompt[-LENGTH:]


def in_training(model: Any) -> str:
    """The adapter that is in training.

    Raises:
        ValueError: there is none, or several.
    """
    adapters = getattr(model, "peft_config", {})
    keys = [key.split(".") for key, parameter in model.named_parameters() if parameter.requires_grad]
    found = [name for name in adapters if any(name in key for key in keys)]
    if len(found) != 1:
        raise ValueError(
            f"InputStatisticsCallback is for one adapter in training; the model has {found or 'none'}"
            f" of {sorted(adapters)}. Name it: InputStatisticsCallback(adapter_name=NAME)."
        )
    return found[0]


@contextmanager
def saved(model: Any, name: str) -> Iterator[Path]:
    """A folder for the length of a block, with an adapter as the trainer will save it; an error that is about the
    folder is about the adapter."""
    with tempfile.TemporaryDirectory() as parent:
        model.save_pretrained(parent, selected_adapters=[name])
        folder = next(Path(parent).rglob(TENSORS)).parent
        try:
            yield folder
        except ValueError as error:
            raise ValueError(str(error).replace(str(folder), f"adapter {name!r}")) from error
