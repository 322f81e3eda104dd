"""Makes the methods known to an unmodified PEFT. The only file that touches PEFT's registration.

PEFT finds everything about a method by its member of the enum `PeftType`. Enums are closed, so the member is added in
place, in the fields that CPython has used for members since 3.4, and the rest goes through PEFT's own
`register_peft_method`. Importing `peft_mora` runs this once; running it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any, NamedTuple

import peft
from packaging.version import Version


CHECKED = "0.21.0 to 0.21.2"  # releases of PEFT that the test-suite was run against
OLDEST = Version("0.21.0")  # 0.20 registers too, but loads sparse LORI and saved-without-projection files wrongly


class Method(NamedTuple):
    """One adapter method. Its config has `method`, the name in capitals; its model `prefix`, in lower case with a
    trailing underscore, and `tuner_layer_cls`."""

    config: Any
    model: Any

    @property
    def name(self) -> str:
        """As recipes and tables have it: "mora"."""
        return self.config.method.lower()


registered: dict[str, Method] = {}  # what PEFT knows by now, for rooms below the table to name


def register(config_cls: Any, model_cls: Any, adapter: bool = True) -> None:
    """Tell PEFT of one method: enum member, config, model and parameter prefix.

    Args:
        adapter: whether it is one of the adapters that messages speak of.

    Raises:
        ImportError: this PEFT is too old, has a method of that name, or no longer registers methods the way it did.
    """
    if Version(peft.__version__) < OLDEST:
        raise does_not_fit(RuntimeError(f"its oldest supported release is {OLDEST}"))
    method = Method(config_cls, model_cls)
    name = config_cls.method
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import PeftType, register_peft_method

        known = PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
        if known is not None and known.__module__ == config_cls.__module__:
            if adapter:
                registered[method.name] = method
            return
        if name in PeftType.__members__:
            raise ImportError(
                f"peft {peft.__version__} has a method named {name} of its own, which peft_mora cannot replace. Use a "
                f"peft that peft_mora was checked with ({CHECKED}), or a newer peft_mora."
            )
        add_member(PeftType, name)
        try:
            register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)
        except Exception:
            remove_member(PeftType, name)  # a second import must say the same
            raise
        if adapter:
            registered[method.name] = method
    except (ImportError, AttributeError, TypeError, KeyError, ValueError) as error:
        if isinstance(error, ImportError) and "peft_mora" in str(error):
            raise
        raise does_not_fit(error) from error


def add_member(enum: type[Enum], name: str) -> None:
    """Add `name = "name"` to an enum of strings: lookup by name, lookup by value and iteration see it afterwards."""
    member: Any = str.__new__(enum, name)  # type: ignore[type-var]
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(enum._member_names_)
    member.__objclass__ = enum
    type.__setattr__(enum, name, member)  # the enum's own __setattr__ guards existing members
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    if hasattr(enum, "_hashable_values_"):  # Python 3.14 looks values up here first
        enum._hashable_values_.append(name)


def remove_member(enum: type[Enum], name: str) -> None:
    """Undo `add_member`."""
    type.__delattr__(enum, name)
    enum._member_names_.remove(name)
    for by_name in (enum._member_map_, enum._value2member_map_):
        del by_name[name]
    if hasattr(enum, "_hashable_values_"):
        enum._hashable_values_.remove(name)


def does_not_fit(error: Exception) -> ImportError:
    """One line for a PEFT release that changed under us."""
    return ImportError(
        f"peft_mora was checked with peft {CHECKED} and does not fit peft {peft.__version__} "
        f"({type(error).__name__}: {error}). Install a peft from that range, or a newer peft_mora."
    )


def guard_optimizers() -> None:
    """Let PEFT's optimizers for LoRA refuse the registered methods, whose A and B they do not find, or find amiss.

    LoRA+ tells B by "lora_B" in a parameter's name or by its having one dimension, LoRA-FA pairs all that have "lora"
    in theirs. Called when a model is made: by then PEFT is imported, and this costs 3 ms.
    """
    try:
        from peft.optimizers import lorafa, loraplus

        parameter_names, init = loraplus.get_parameter_names, lorafa.LoraFAOptimizer.__init__
    except (ImportError, AttributeError):  # another PEFT, with other optimizers
        return
    if parameter_names.__module__ == __name__:
        return

    def refuse(names: Iterable[str], optimizer: str) -> None:
        found = {m.name.upper() for m in registered.values() if any(f".{m.model.prefix}" in name for name in names)}
        if found:
            raise ValueError(
                f"{optimizer} finds A and B by the names that LoRA has for them, and would not treat those of this "
                f"{found.pop()} adapter as its A and B. Make the groups yourself:\n"
                "    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}\n"
                '    A = [p for n, p in trained.items() if "_B." not in n]  # empty where A is frozen\n'
                '    B = [p for n, p in trained.items() if "_B." in n]\n'
                '    torch.optim.AdamW([{"params": A, "lr": lr}, {"params": B, "lr": ratio * lr}])'
            )

    # What the functions call, and not they: a script may have imported them already.
    def get_parameter_names(model: Any, *args: Any, **kwargs: Any) -> Any:
        refuse([name for name, p in model.named_parameters() if p.requires_grad], "create_loraplus_optimizer")
        return parameter_names(model, *args, **kwargs)

    def __init__(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        named: dict[str, Any] = {}
        for group in params:
            if isinstance(group, dict) and "names" in group:
                group["params"] = list(group["params"])
                named |= zip(group["names"], group["params"], strict=False)
        try:
            refuse(named, "create_lorafa_optimizer")
        except ValueError:  # PEFT has frozen what has "lora_A" in its name, an "mtllora_A" too
            for name, A in named.items():
                if "mtllora_A." in name and (B := named.get(name.replace("_A.", "_B."))) is not None:
                    A.requires_grad_(B.requires_grad)
            raise
        init(self, params, *args, **kwargs)

    for ours, theirs in ((get_parameter_names, parameter_names), (__init__, init)):
        vars(ours)["__wrapped__"] = theirs  # so that their signatures stay what they were
    loraplus.get_parameter_names = get_parameter_names
    lorafa.LoraFAOptimizer.__init__ = __init__  # type: ignore[method-assign]
