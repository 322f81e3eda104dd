"""Any valid config survives its file and its weights survive theirs; any invalid field is refused by name."""

import copy
import tempfile
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from peft_mora import METHODS


CONFIGS = {name: method.config for name, method in METHODS.items()}
DEFAULTS = {name: {f.name: getattr(config(), f.name) for f in fields(config)} for name, config in CONFIGS.items()}
MODULES = ["lin0", "lin1"]
FAST = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"lin0": nn.Linear(9, 7), "lin1": nn.Linear(7, 9)}) for _ in "ab"])
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer["lin1"](torch.relu(layer["lin0"](x)))
        return self.head(x)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return MLP().eval()


def optional(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | values


ranks = st.integers(1, 12)
positive = st.floats(1e-6, 1e6)
share = st.floats(0, 1)
below_one = st.floats(0, 1, exclude_max=True)
names = st.text("abc xyz_äß0'\"\\", min_size=1, max_size=6)

# Of every field that any method has: what it takes. A method that shares a field needs nothing here.
VALID = {
    "r": ranks,
    "alpha": positive | st.integers(1, 64),
    "dropout": below_one,
    "target_modules": st.sampled_from([["lin0"], ["lin1"], MODULES, "all-linear", r".*lin0", r".*\.1\.lin(0|1)"]),
    "exclude_modules": st.sampled_from([None, ["layers.9.lin0"], r".*nothing"]),
    "rank_pattern": st.dictionaries(st.sampled_from([*MODULES, r"layers\.1\.lin0", ".*0"]), ranks, max_size=3),
    "alpha_pattern": st.dictionaries(st.sampled_from(MODULES), positive, max_size=2),
    "modules_to_save": st.sampled_from([None, ["head"]]),
    "init_weights": st.booleans(),
    "inference_mode": st.booleans(),
    "seed": st.integers(0, 2**70),
    "save_projection": st.booleans(),
    "routing": st.sampled_from(["task", "bank", "dense"]),
    "temperature": positive,
    "threshold": share,
    "tasks": st.lists(names, min_size=1, max_size=3, unique=True),
    "ups": st.integers(1, 4),
    "sparsity": optional(below_one),
    "density": optional(st.floats(0, 1, exclude_min=True)),
    "selection": st.sampled_from(["magnitude", "signed"]),
    "balance_rate": st.floats(0, 10),
    "rank_partition": st.integers(1, 3),
    "experts": st.integers(1, 3),
    "selection_weight": st.floats(0, 10),
    "balance_weight": st.floats(0, 10),
}


@st.composite
def valid(draw, method: str):
    values = {name: draw(strategy) for name, strategy in VALID.items() if name in DEFAULTS[method]}
    if isinstance(values["target_modules"], list) and draw(st.booleans()):
        values["layers_to_transform"] = draw(st.sampled_from([0, [1], [0, 1]]))
        values["layers_pattern"] = draw(st.sampled_from(["layers", ["layers", "h"]]))
    smallest = min([values["r"], *values["rank_pattern"].values()])
    if P := values.get("rank_partition"):
        values |= {"r": P * values["r"], "rank_pattern": {key: P * r for key, r in values["rank_pattern"].items()}}
    if "top_k" in DEFAULTS[method]:
        count = st.integers(1, smallest)
        values["top_k"] = draw(optional(count) if DEFAULTS[method]["top_k"] is None else count)
        values["top_k_pattern"] = draw(st.dictionaries(st.sampled_from(MODULES), count, max_size=2))
    if "default_task" in DEFAULTS[method]:
        values["default_task"] = draw(st.sampled_from(values["tasks"]))
    if "selected" in DEFAULTS[method]:
        values["selected"] = draw(st.integers(1, values["experts"]))
    return CONFIGS[method](**values)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_any_valid_config_and_its_weights_survive_their_files(method):
    x = torch.linspace(-1, 1, 45).view(5, 9)

    @FAST
    @given(config=valid(method))
    def check(config):
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            assert type(config).from_pretrained(folder) == PeftConfig.from_pretrained(folder) == config
            model = get_peft_model(mlp(), copy.deepcopy(config)).eval()
            for name, parameter in model.named_parameters():
                if METHODS[method].model.prefix in name:
                    torch.nn.init.normal_(parameter)
            model.save_pretrained(folder)
            again = PeftModel.from_pretrained(mlp(), folder).eval()
        want, got = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
        assert torch.equal(again(x), model(x))

    check()


not_a_number = st.sampled_from([float("nan"), float("inf"), "8", None, [1], True])
not_positive = st.integers(-9, 0) | st.floats(-1e6, 0) | not_a_number
not_a_count = st.integers(-9, 0) | st.floats(0.1, 9) | st.sampled_from(["8", [1], True, float("nan")])
outside = st.floats(-1e6, 0, exclude_max=True) | st.floats(1, 1e6, exclude_min=True) | not_a_number
not_none = st.sampled_from([float("nan"), float("inf"), "8", [1], True])
beyond = st.floats(-1e6, 0, exclude_max=True) | st.floats(1, 1e6)
not_a_bool = st.sampled_from([None, 0, 1, "True", "gaussian", []])
other_word = st.text(max_size=8).filter(lambda word: word not in {"task", "bank", "dense", "magnitude", "signed"})

not_a_dict = st.sampled_from([None, 4, "lin0", [("lin0", 4)], {4: 4}])
not_names = st.integers() | st.sampled_from([[1], [None], 0.5, True, {"lin0": 1}])

not_entries = not_a_dict.filter(lambda v: not isinstance(v, dict)) | st.fixed_dictionaries(
    {"lin0": st.integers(-9, -1)}
)

# What each refuses, besides None where its default is another value.
WRONG = {
    "r": not_a_count,
    "alpha": not_positive,
    "dropout": beyond | not_a_number,
    "init_weights": not_a_bool,
    "rank_pattern": st.fixed_dictionaries({"lin0": not_a_count}) | not_a_dict,
    "alpha_pattern": st.fixed_dictionaries({"lin0": not_positive}) | not_a_dict,
    "target_modules": not_names,
    "exclude_modules": not_names,
    "layers_to_transform": st.integers(-9, -1) | st.sampled_from(["1", [1.0], [True], [-1], {"a": 1}, 1.5]),
    "layers_pattern": not_names,
    "modules_to_save": not_names | st.text(),
    "target_parameters": not_names | st.text(),
    "trainable_token_indices": st.integers()
    | st.sampled_from(["5", [1.5], [-1], {"embed": 5}, {5: [5]}, {"e": ["5"]}]),
    "inference_mode": not_a_bool,
    "top_k": not_a_count,
    "top_k_pattern": st.fixed_dictionaries({"lin0": not_a_count | st.integers(65, 99)}) | not_a_dict,
    "seed": st.integers(-99, -1) | not_none | st.floats(0, 9),
    "save_projection": not_a_bool,
    "routing": other_word,
    "temperature": not_positive,
    "threshold": outside,
    "tasks": st.sampled_from([[], [""], ["a", "a"], [1], [None], 3]),
    "default_task": st.sampled_from(["other", "", 0, ["initial"]]),
    "ups": not_a_count,
    "block_sizes": st.sampled_from([[4], {"lin0": [1, 2]}, {"lin0": [-1]}]),
    "frozen_top_k": st.sampled_from([{"lin0": [1]}]),
    "sparsity": beyond | not_none,
    "kept_entries": not_entries,
    "frozen_entries": not_entries,
    "density": st.floats(-1e6, 0) | st.floats(1, 1e6, exclude_min=True) | not_none,
    "selection": other_word,
    "balance_rate": st.floats(-1e6, 0, exclude_max=True) | not_a_number,
    "rank_partition": not_a_count | st.just(65),
    "kept_experts": not_entries,
    "experts": not_a_count,
    "selected": not_a_count | st.integers(4, 99),
    "selection_weight": st.floats(-1e6, 0, exclude_max=True) | not_a_number,
    "balance_weight": st.floats(-1e6, 0, exclude_max=True) | not_a_number,
}
ALSO_NONE = {"seed"}  # a projection from nowhere, with save_projection


def wrong(method: str, field: str) -> st.SearchStrategy:
    values, defaults = WRONG[field], DEFAULTS[method]
    if field == "top_k":
        values |= st.integers(defaults["r"] + 1, 99)
    return values if defaults[field] is None or field in ALSO_NONE else values | st.none()


@pytest.mark.parametrize(("method", "field"), [(m, field) for m in CONFIGS for field in WRONG if field in DEFAULTS[m]])
def test_any_invalid_field_is_refused_by_name(method, field):
    @FAST
    @given(value=wrong(method, field))
    def check(value):
        with pytest.raises(ValueError) as caught:
            CONFIGS[method](**{field: value})
        assert f"`{field}" in str(caught.value)
        shown = [repr(value)] + ([repr(inner) for inner in value.values()] if isinstance(value, dict) else [])
        assert any(text in str(caught.value) for text in shown)

    check()


@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_no_regular_expression_is_refused_by_field_and_pattern(method):
    wrong = "*.lin0"
    values = {"target_modules": wrong, "exclude_modules": wrong}
    values |= {name: {"lin0": 1, wrong: 1} for name in ("rank_pattern", "alpha_pattern", "top_k_pattern")}
    for name in values.keys() & DEFAULTS[method].keys():
        with pytest.raises(ValueError, match=rf"`{name}` has '\*\.lin0'.*nothing to repeat.*Write"):
            CONFIGS[method](**{name: values[name]})
    with pytest.raises(ValueError, match=r"`layers_pattern` has '\(h'.*unterminated"):
        CONFIGS[method](layers_to_transform=[0], layers_pattern=["layers", "(h"])


@pytest.mark.parametrize("method", CONFIGS)
def test_every_field_of_a_method_is_fuzzed(method):
    own = DEFAULTS[method].keys() - {f.name for f in fields(PeftConfig)}
    written_by_functions = {"kept_entries", "frozen_entries", "block_sizes", "frozen_top_k", "kept_experts"}
    chosen_above = {"top_k", "top_k_pattern", "layers_to_transform", "layers_pattern", "default_task", "selected"}
    elsewhere = {"trainable_token_indices", "target_parameters"}  # need embeddings, experts
    assert own <= VALID.keys() | written_by_functions | chosen_above | elsewhere and own <= WRONG.keys()
