"""Bases and saved adapters, opened so that nothing of a file is left out.

PEFT warns of a first adapter's weights that its file does not have, says nothing of those that the base has no place
for, and nothing at all where there is an adapter already: what comes out is then the base, in part or whole.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import transformers
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError

from . import registry
from .inputs import modules_back
from .lora_file import check_base_kept


CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def base_class(folder: str | Path, base: str | Path) -> Any:
    """The class of transformers that an adapter's base is to be opened with: by its task type or, where it has none,
    the one that it was trained over; a causal language model's where it says neither. Where that class opens no such
    base (of a model of images and text that was trained as "CAUSAL_LM"), the one that the base names."""
    config = PeftConfig.from_pretrained(str(folder))
    task = getattr(config.task_type, "value", config.task_type)
    named = (config.auto_mapping or {}).get("base_model_class") if task is None else CLASSES.get(task)
    found: Any = getattr(transformers, named, None) if isinstance(named, str) else None
    found = found if hasattr(found, "from_pretrained") else transformers.AutoModelForCausalLM
    if not hasattr(found, "_model_mapping"):  # no auto class
        return found
    config_of_base = transformers.AutoConfig.from_pretrained(base, **revision_of(folder, base))
    if type(config_of_base) in found._model_mapping:
        return found
    named = next((name for name in config_of_base.architectures or () if hasattr(transformers, name)), None)
    return getattr(transformers, named) if named else found


def revision_of(folder: str | Path, base: str | Path) -> dict[str, str]:
    """{"revision": ...} of a base for from_pretrained, where it is the one that the adapter's config names."""
    config = PeftConfig.from_pretrained(str(folder))
    there = config.revision if str(base) == str(config.base_model_name_or_path) else None
    return {"revision": there} if there else {}


def with_adapter(model: Any, folder: str | Path, name: str = "default") -> PeftModel:
    """A base model, or a PeftModel with the adapters that it has, with the adapter of a folder.

    Raises:
        ValueError: its weights are not those of this base's modules, or their file is damaged; it, or an adapter that
            is there, has changed the base for the other (PiSSA); the model has an adapter of that name. The model is
            as it was then.
    """
    there = isinstance(model, PeftModel)
    if there and name in model.peft_config:
        raise ValueError(
            f"The model has an adapter {name!r} already, whose config would stay: give another name, or "
            f"model.delete_adapter({name!r}) first."
        )
    modules, described = {} if there else dict(model.named_modules()), "peft_config" in vars(model)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        return _opened(model, folder, name)
    except Exception:
        if there and name in model.peft_config:
            model.delete_adapter(name)
        elif not there:
            modules_back(model, modules)
            if not described:
                vars(model).pop("peft_config", None)
        for parameter, trains in trained:
            parameter.requires_grad = trains
        raise


def _opened(model: Any, folder: str | Path, name: str) -> PeftModel:
    try:
        if not isinstance(model, PeftModel):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*missing adapter keys")
                model = PeftModel.from_pretrained(model, folder, name)
        found = model.load_adapter(folder, name)  # again, if it has just been: this one says what was left out
    except SafetensorError as error:
        raise ValueError(f"{folder} is damaged ({error}): save the adapter again.") from error
    except RuntimeError as error:
        wrong = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), None)
        if wrong is None:
            raise
        raise _of_another(folder, model, wrong.rstrip(".")) from error
    if len(model.peft_config) > 1:
        check_base_kept(model.peft_config)
    config = model.peft_config[name]
    known = {"LORA", *(method.upper() for method in registry.registered)}  # of others some weights are in no file
    missing = [key for key in found.missing_keys if f".{name}." in f"{key}." and config.peft_type.value in known]
    unknown = [] if config.is_prompt_learning else found.unexpected_keys  # soft prompts have a name of their own there
    for what, keys in (("nothing in the file for", missing), ("no place for", unknown)):
        if keys:
            raise _of_another(folder, model, f"as {_class_of(model)} it has {what} {keys[0]!r}")
    return model


def _of_another(folder: str | Path, model: Any, why: str) -> ValueError:
    return ValueError(
        f"The adapter in {folder} is of another base than {model.config.name_or_path} ({why}): give the one that it "
        "was trained over as --model."
    )


def _class_of(model: Any) -> str:
    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
