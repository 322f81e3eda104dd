"""Folders that appear whole, and adapters read and written without a model."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import LORA, METHODS, STATIC, adapted, tiny_gpt2, tiny_llama
from peft import LoraConfig, PeftModel, VeloraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_mora.export import exact_lora
from peft_mora.files import check_new, check_own, whole_folder
from peft_mora.lora_file import Lora, digest, read_lora, write_lora
from peft_mora.merging import collect_inputs, merge_adapters, merge_into_base
from trl_callbacks.subspace import Subspace


WRITTEN = Path(__file__).parent / "written_by_0.1"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# Folders


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_is_written_has_the_modes_that_mkdir_and_open_give(umask, tmp_path):
    old = os.umask(umask)
    try:
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "file").write_text("")
        write_lora(tmp_path / "lora", {"lin": Lora(torch.ones(2, 3), torch.ones(4, 2))})
        Subspace("inputs", {}, right={"a": torch.eye(3)}, groups={"a": ("a",)}).save(tmp_path / "subspace")
        with whole_folder(tmp_path / "deep") as written:
            (written / "inner").mkdir()
            save_file({"a": torch.ones(1)}, written / "inner" / "a.safetensors")
    finally:
        os.umask(old)
    folder, file = mode(tmp_path / "plain"), mode(tmp_path / "plain" / "file")
    for path in tmp_path.rglob("*"):
        assert mode(path) == (folder if path.is_dir() else file), path
    assert (folder, file) == (0o777 & ~umask, 0o666 & ~umask)


@pytest.mark.parametrize("when", ["written", "renamed"])
def test_a_failure_half_way_leaves_the_old_folder_and_nothing_else(when, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    rename = Path.rename

    def full_disk(self, target):
        if when == "renamed" and (self / "file").read_text() == "new":
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(OSError, match="no space"), whole_folder(folder, replace=True) as written:
        (written / "file").write_text("new")
        if when == "written":
            raise OSError("no space")
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(folder) == ["file"]
    assert (folder / "file").read_text() == "old"


def test_a_folder_is_replaced_whole_and_only_where_that_is_asked_for(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("one", "two", ".DS_Store"):
        (folder / name).write_text("old")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(FileExistsError, match="delete it"), whole_folder(folder):
        raise AssertionError("not to be entered")
    with whole_folder(tmp_path / "link", replace=True) as written:
        for name in ("one", "two"):
            (written / name).write_text("new")
    assert sorted(os.listdir(folder)) == ["one", "two"] and (tmp_path / "link").is_symlink()
    assert (folder / "one").read_text() == "new"
    with pytest.raises(FileExistsError, match="meanwhile"), whole_folder(tmp_path / "other"):
        (tmp_path / "other").mkdir()
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "other"]


@pytest.mark.parametrize("other", ["notes.txt", ".git", "pets/adapter_model.safetensors", "one/two"])
def test_a_folder_that_holds_something_else_is_not_replaced(other, tmp_path):
    folder = tmp_path / "folder"
    (folder / other).parent.mkdir(parents=True)
    for name in ("two", other):
        (folder / name).write_text("old")
    before = sorted(tmp_path.rglob("*"))
    match = f"folder holds '{other.split('/')[0]}', which would be deleted.*give a folder of its own.*but one, two"
    with pytest.raises(FileExistsError, match=match):
        check_own(folder, ("two", "one"))
    with pytest.raises(FileExistsError, match=match), whole_folder(folder, replace=True) as written:
        for name in ("one", "two"):
            (written / name).write_text("new")
    assert sorted(tmp_path.rglob("*")) == before and (folder / "two").read_text() == "old"
    with pytest.raises(FileExistsError, match="two is a file, where a folder is to be"):
        check_own(folder / "two", ("one", "two"))
    check_own(tmp_path / "nowhere", ())


def test_a_folder_in_a_file_is_refused_before_there_is_something_to_write(tmp_path):
    (tmp_path / "file").write_text("old")
    inside = tmp_path / "file" / "one" / "two"
    for refused in (check_new, lambda path: check_own(path, ()), lambda path: whole_folder(path).__enter__(),
                    lambda path: whole_folder(path, replace=True).__enter__()):  # fmt: skip
        with pytest.raises(FileExistsError, match="file is a file, so that no folder can be written in it"):
            refused(inside)
    with pytest.raises(FileExistsError, match="exists: delete it"):
        check_new(tmp_path / "file")
    check_new(tmp_path / "no" / "where")


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, monkeypatch):
    model = adapted(LORA, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(os, "access", lambda *args: False)  # as root, tests can write everywhere
    for refused in (
        lambda: check_new(tmp_path / "new"),
        lambda: whole_folder(tmp_path / "adapter", replace=True).__enter__(),
        lambda: merge_adapters([tmp_path / "adapter"], "mean", output=tmp_path / "deep" / "new"),
        lambda: collect_inputs(model.unload(), ["the cat"], tmp_path / "adapter"),
    ):
        with pytest.raises(PermissionError, match="cannot be written to: give another folder"):
            refused()


# Files


def saved_lora(folder: Path, base=tiny_llama, **fields) -> PeftModel:
    model = adapted(LoraConfig, base(), **{"r": 4, **fields})
    model.save_pretrained(folder)
    return model


def deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    """ΔW (O, I) of each module by PEFT's own layers."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight("default").detach()
            found[name] = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 12},
        {"use_rslora": True},
        {"lora_alpha": 12, "rank_pattern": {"q_proj": 6, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"mlp.*": 3}},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
        {"base": tiny_gpt2, "target_modules": ["c_attn"]},  # a Conv1D, read in the layout of nn.Linear
    ],
)
def test_factors_of_a_lora_multiply_to_the_update_that_peft_adds(fields, tmp_path):
    model = saved_lora(tmp_path, **fields)
    found = {name: B @ A for name, (A, B) in read_lora(tmp_path).loras.items()}
    torch.testing.assert_close(found, deltas(model), rtol=1e-5, atol=1e-6)


def test_a_16_bit_file_is_read_in_float32_and_scaled_there(tmp_path):
    saved_lora(tmp_path, lora_alpha=3)
    tensors = {key: t.bfloat16() for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    name, (A, B) = next(iter(read_lora(tmp_path).loras.items()))
    assert A.dtype == B.dtype == torch.float32
    assert torch.equal(B, tensors[f"base_model.model.{name}.lora_B.weight"].float() * 0.75)


def test_plain_peft_opens_what_is_written_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = {"model.layers.0.self_attn.q_proj": (64, 64, 3), "model.layers.1.mlp.down_proj": (128, 64, 5)}
    loras = {
        name: Lora(torch.randn(k, i, generator=generator), torch.randn(o, k, generator=generator))
        for name, (i, o, k) in sizes.items()
    }
    config = write_lora(tmp_path / "lora", loras, task_type="CAUSAL_LM")
    assert config.r == config.lora_alpha == 5
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    assert set(model.targeted_module_names) == set(loras)
    for name, (A, B) in loras.items():
        layer = model.base_model.model.get_submodule(name)
        assert (
            torch.equal(layer.lora_A.default.weight[: len(A)], A) and not layer.lora_A.default.weight[len(A) :].any()
        )
        assert torch.equal(layer.lora_B.default.weight[:, : len(A)], B) and layer.scaling["default"] == 1
    again = read_lora(tmp_path / "lora").loras
    assert all(torch.equal(again[n].B[:, : len(A)], B) for n, (A, B) in loras.items())


def test_packed_B_is_read_where_its_shape_can_be_told(tmp_path):
    model = adapted("lori", r=8, sparsity=0.5, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(read_lora(tmp_path).loras, exact_lora(model), rtol=0, atol=0)
    with pytest.raises(ValueError, match="rows cannot be told.*export"):
        read_lora(WRITTEN / "lori-sparse")
    with pytest.raises(ValueError, match="leaves out the projection.*save_projection=True"):
        read_lora(WRITTEN / "lori-unsaved-projection")


@pytest.mark.parametrize("name", ["mora", "mora-bank", "flylora"])
def test_routed_adapters_are_refused_with_the_way(name):
    with pytest.raises(ValueError, match="depend on the input.*peft-mora export"):
        read_lora(WRITTEN / name)


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "'corda'"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config="),
        ({"trainable_token_indices": [1, 2]}, "embeddings of tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
        ({"of_a_newer_peft": 3}, "of_a_newer_peft=3"),
        ({"peft_type": "LOHA"}, "type 'LOHA', which this does not read: LORA, MORA, LORI, "),
        ({"r": 5}, "rank 5 by adapter_config.json"),
        ({"rank_pattern": {"v_proj": 2}}, "rank 2 by adapter_config.json"),
    ],
)
def test_what_is_no_plain_update_is_refused_by_its_field(fields, message, tmp_path):
    saved_lora(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path)


def test_damaged_files_and_foreign_tensors_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        read_lora(tmp_path)
    saved_lora(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    for damage, message in (
        ({key: tensors[key] / 0}, "not finite, e.g. in 'model.layers.0.mlp.up_proj'"),
        ({key: tensors[key][:2].clone()}, r"lora_A \(2, 64\)"),
        ({"base_model.model.model.embed_tokens.weight": torch.ones(64, 64)}, "embed_tokens.*embeddings"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)}, "no factor of a linear"),
        ({key.replace("lora_A", "lora_magnitude_vector"): torch.ones(4)}, "magnitude"),
    ):
        save_file(tensors | damage, file)
        with pytest.raises(ValueError, match=message):
            read_lora(tmp_path)
    save_file({k: t for k, t in tensors.items() if k != key}, file)
    with pytest.raises(ValueError, match=r"module 'model.layers.0.mlp.up_proj' has lora_B"):
        read_lora(tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        read_lora(tmp_path)


def test_modules_saved_in_full_are_kept_apart_from_the_factors(tmp_path):
    saved_lora(tmp_path, modules_to_save=["lm_head"], target_modules=["q_proj"])
    file = read_lora(tmp_path)
    assert set(file.saved) == {"base_model.model.lm_head.weight"}
    assert all("q_proj" in name for name in file.loras)


@pytest.mark.parametrize(("name", "saved"), [("norm", 5), ("model.norm", 1), ("mlp", 6), ("layers.0.mlp", 3)])
def test_modules_saved_in_full_are_those_whose_path_ends_with_a_name_as_peft_takes_them(name, saved, inputs, tmp_path):
    """Of "norm" the norms of every layer too; they merge, and go into the base, where adapters agree on them."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(LORA, base, target_modules=["q_proj"], modules_to_save=[name], task_type="CAUSAL_LM")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "one")
    assert len(read_lora(tmp_path / "one").saved) == saved
    merge_adapters([tmp_path / "one"], "mean", output=tmp_path / "merged")
    merge_into_base(tmp_path / "merged", tmp_path / "whole", dtype=torch.float32)
    opened = PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged").eval()
    for found in (opened, AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()):
        torch.testing.assert_close(found(inputs).logits, model(inputs).logits, rtol=1e-4, atol=1e-4)


def test_what_peft_saves_of_a_resized_base_is_told_apart_from_what_was_trained(inputs, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    base.save_pretrained(tmp_path / "resized")
    model = adapted(LORA, base, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        model.save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match=r"holds '.*\.weight', .*resized.*save_embedding_layers=False"):
        merge_adapters([tmp_path / "one"])
    model.save_pretrained(tmp_path / "two", save_embedding_layers=False)  # what the message says
    merge_into_base(tmp_path / "two", tmp_path / "whole", base=tmp_path / "resized", dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(whole(inputs).logits, model(inputs).logits, rtol=1e-4, atol=1e-4)


def test_a_backward_that_keeps_less_in_memory_leaves_the_update_a_lora_s(inputs, tmp_path):
    """VeLoRA: the forward, and what PEFT merges, are LoRA's; beside the factors its file has what was projected on."""
    model = saved_lora(tmp_path, target_modules=["q_proj"], velora_config=VeloraConfig(num_groups=4))
    assert any("velora_embed" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    found = {name: B @ A for name, (A, B) in read_lora(tmp_path).loras.items()}
    torch.testing.assert_close(found, deltas(model), rtol=1e-5, atol=1e-6)
    write_lora(tmp_path / "lora", read_lora(tmp_path).loras)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(plain(inputs).logits, model(inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"base_model_name_or_path": ["x"]}, {"task_type": ["x"]}, {"revision": 3}, {"modules_to_save": 5},
        {"target_modules": [1, "a"]}, {"rank_pattern": {"(": 3}}, {"alpha_pattern": {"*": 3}},
        {"rank_pattern": 5}, {"alpha_pattern": ["q"]}, {"auto_mapping": "x"}, {"rows": ["x"]}, {"rows": {"a": 1}},
        {"tasks": 3}, {"adapters": {"a": 3}}, {"adapters": {"a": {}}}, {"router": [1]},
    ],
)  # fmt: skip
def test_fields_of_another_kind_than_peft_writes_are_damage(fields, tmp_path):
    write_lora(tmp_path / "lora", {"lin": Lora(torch.ones(2, 3), torch.ones(4, 2))})
    path = tmp_path / "lora/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=f"lora is damaged .*`{next(iter(fields))}.*save the adapter again"):
        read_lora(tmp_path / "lora")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_updates_in_no_float_of_16_bits_are_refused(dtype, tmp_path):
    write_lora(tmp_path / "lora", {"lin": Lora(torch.ones(2, 3), torch.ones(4, 2))})
    path = tmp_path / "lora/adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=f"module 'lin' is stored as {dtype}, .*save the adapter again"):
        read_lora(tmp_path / "lora")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("method", STATIC)
def test_own_updates_in_no_float_of_16_bits_are_refused_too(method, dtype, tmp_path):
    fields = {"save_projection": True} if "lori" in method else {}
    adapted(
        METHODS[method], target_modules=["q_proj"], **fields | ({} if method == "furina" else {"r": 8})
    ).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    found = load_file(path)
    assert read_lora(tmp_path).loras
    save_file({key: x.to(dtype) if x.is_floating_point() else x for key, x in found.items()}, path)
    with pytest.raises(ValueError, match=f"is stored as {dtype}, .*save the adapter again"):
        read_lora(tmp_path)


@pytest.mark.parametrize("what", ["A", "B"])
@pytest.mark.parametrize("shape", [(), (5,), (0, 0)])
def test_own_factors_of_no_size_are_damage(what, shape, tmp_path):
    adapted(METHODS["mora-dense"], target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: torch.ones(shape) if f"mora_{what}" in k else x for k, x in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="no factors of an update. The file is damaged"):
        read_lora(tmp_path)


def test_nested_too_deeply_is_damage(tmp_path):
    write_lora(tmp_path / "lora", {"lin": Lora(torch.ones(2, 3), torch.ones(4, 2))})
    (tmp_path / "lora/adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="lora is damaged .RecursionError"):
        read_lora(tmp_path / "lora")


def test_weights_that_differ_at_their_end_have_another_digest_and_float64_stays(tmp_path):
    long = torch.zeros(2, 700_000)
    for name, last in (("one", 0.0), ("two", 1.0)):
        long[-1, -1] = last
        write_lora(tmp_path / name, {"lin": Lora(long, torch.ones(4, 2, dtype=torch.float64))})
    assert (tmp_path / "one/adapter_model.safetensors").stat().st_size > 5 * 2**20
    assert digest(tmp_path / "one") != digest(tmp_path / "two")
    A, B = read_lora(tmp_path / "one").loras["lin"]
    assert A.dtype == torch.float32 and B.dtype == torch.float64


def test_the_first_of_two_patterns_counts_as_in_the_file(tmp_path):
    write_lora(tmp_path / "lora", {"model.lin": Lora(torch.ones(2, 3), torch.ones(4, 2))})
    path = tmp_path / "lora/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {"lin": 6, ".*lin": 10}}))
    assert read_lora(tmp_path / "lora").loras["model.lin"].B[0, 0] == 3
