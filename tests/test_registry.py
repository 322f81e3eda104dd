"""How PEFT learns of the methods. Whatever would change PEFT's registration for good happens to a stand-in for it."""

import copy
import importlib
import json
import pickle
from enum import Enum
from types import SimpleNamespace

import peft
import peft.mapping as mapping
import pytest
from peft import PeftType
from peft.utils import peft_types

import peft_mora
from peft_mora import MoraConfig, registry
from peft_mora.registry import CHECKED, register


CONFIGS = {method.config.method: method.config for method in peft_mora.METHODS.values()}
MAPPINGS = tuple(name for name in vars(mapping) if name.startswith("PEFT_TYPE_TO_"))


class NewConfig:
    method = "NEW"


class NewModel:
    prefix = "new_"


def state() -> tuple:
    mappings = [dict(getattr(mapping, name)) for name in MAPPINGS]
    return list(PeftType), dict(PeftType.__members__), mappings, dict(registry.registered)


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = state()
    yield
    assert state() == before


@pytest.fixture
def stand_in(monkeypatch) -> SimpleNamespace:
    """A PEFT with one method, LORA, that nobody else looks at: its enum `types` and its mapping `configs`."""

    class Types(str, Enum):
        LORA = "LORA"

    monkeypatch.setattr(registry, "registered", {})
    for name in MAPPINGS:
        monkeypatch.setattr(mapping, name, {})
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[Types.LORA] = peft.LoraConfig
    for module in (peft, peft.utils, peft_types):
        monkeypatch.setattr(module, "PeftType", Types)
    return SimpleNamespace(types=Types, configs=mapping.PEFT_TYPE_TO_CONFIG_MAPPING)


@pytest.mark.parametrize("name", CONFIGS)
def test_importing_registers_the_method_with_all_of_peft(name):
    member = PeftType[name]
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] is CONFIGS[name]
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[name].prefix == mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name]
    assert CONFIGS[name]().peft_type is member


@pytest.mark.parametrize("name", CONFIGS)
def test_a_member_is_like_the_ones_that_peft_defines(name):
    member, lora = PeftType(name), PeftType.LORA
    assert member is PeftType[name] is getattr(PeftType, name) is PeftType.__members__[name]
    assert (member.name, member.value) == (name, name)
    assert member in PeftType and member in list(PeftType) and name in list(PeftType)
    assert list(PeftType).count(member) == 1 and len(PeftType) == len(list(reversed(PeftType))) == len(set(PeftType))
    assert type(member) is PeftType and isinstance(member, str)
    assert member == name and hash(member) == hash(name) and {name: 1}[member] == 1 and member != lora
    for show in (repr, str, format):
        assert show(member) == show(lora).replace("LORA", name)
    assert json.dumps({"peft_type": member}) == json.dumps({"peft_type": name})
    with pytest.raises(AttributeError):
        setattr(PeftType, name, "something else")


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_and_pickles_of_a_member_are_the_member(name):
    member = PeftType[name]
    assert copy.copy(member) is member and copy.deepcopy([member])[0] is member
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    config = CONFIGS[name](target_modules=["a"])
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config and twin.peft_type is member


def test_registering_or_importing_again_changes_nothing():
    before = state()
    model_cls = mapping.PEFT_TYPE_TO_TUNER_MAPPING["MORA"]
    register(MoraConfig, model_cls)
    assert importlib.reload(peft_mora).MoraConfig is MoraConfig
    assert state() == before


def test_one_more_method_needs_one_call(stand_in):
    for _ in range(2):
        register(NewConfig, NewModel)
        assert [member.name for member in stand_in.types] == ["LORA", "NEW"]
    assert stand_in.configs == {"LORA": peft.LoraConfig, "NEW": NewConfig}
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["NEW"] is NewModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["NEW"] == "new_"


def test_a_name_that_peft_has_taken_is_refused_and_left_to_peft(stand_in):
    class TheirsToo(NewConfig):
        method = "LORA"

    with pytest.raises(ImportError, match=f"method named LORA of its own.*peft_mora cannot replace.*{CHECKED}"):
        register(TheirsToo, NewModel)
    assert stand_in.configs == {"LORA": peft.LoraConfig} and list(stand_in.types) == ["LORA"]


def a_new_rule(*, name, config_cls, model_cls):
    raise ValueError("The prefix must not end in an underscore.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda *, name, config_cls, model_cls, something_new: None, "TypeError: .*something_new"),
        (lambda *, peft_name, config_cls, model_cls: None, "TypeError: .*name"),
        (a_new_rule, "ValueError: The prefix must not"),
        (None, "ImportError: cannot import name 'register_peft_method'"),
    ],
)
def test_a_peft_that_registers_in_another_way_is_named_in_one_line(stand_in, monkeypatch, change, reason):
    if change is None:
        monkeypatch.delattr(peft.utils, "register_peft_method")
    else:
        monkeypatch.setattr(peft.utils, "register_peft_method", change)
    for _ in range(2):  # trying again must not hide the reason
        with pytest.raises(ImportError, match=reason) as caught:
            register(NewConfig, NewModel)
        message = str(caught.value)
        assert "\n" not in message and f"does not fit peft {peft.__version__} " in message
        assert f"checked with peft {CHECKED} " in message and "Install a peft from that range" in message
        assert list(stand_in.types) == ["LORA"] and not hasattr(stand_in.types, "NEW")
        with pytest.raises(ValueError):
            stand_in.types("NEW")


def test_a_peft_that_is_too_old_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    with pytest.raises(ImportError, match=r"does not fit peft 0\.20\.0 .*oldest supported release is 0\.21\.0"):
        register(MoraConfig, peft_mora.MoraModel)
