"""The base of the recipes: which 4-bit copy is taken, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_llama
from huggingface_hub import constants
from shared import base_model
from shared.base_model import find_base, load_base


@pytest.fixture
def write(llama_folder):
    """Write a tiny model of this seed into a folder, with a tokenizer."""

    def write(folder, seed: int):
        shutil.copytree(llama_folder, folder, dirs_exist_ok=True)
        tiny_llama(seed).to(torch.bfloat16).save_pretrained(folder)
        return folder

    return write


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "CACHE", tmp_path / "cache")


def packed(folder) -> torch.Tensor:
    return load_base(folder)[0].model.layers[0].mlp.up_proj.weight


def test_two_models_of_one_name_have_a_copy_each(write, tmp_path):
    one, other = (write(tmp_path / run / "merged", seed) for run, seed in (("a", 0), ("b", 1)))
    copies = [find_base(folder) for folder in (one, other, one)]
    assert copies[0] == copies[2] != copies[1]
    assert not torch.equal(packed(copies[0]), packed(copies[1]))


@pytest.mark.parametrize("named", ["merged", "./merged", "merged/", Path("merged")])
def test_a_folder_that_is_written_anew_has_another_copy(named, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "merged", 0)
    before = find_base(named)
    write(folder, 1)
    again = find_base(named)
    assert again != before and not torch.equal(packed(again), packed(before))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load_base(find_base(folder))[1].chat_template == "{{ messages }}"


def test_the_same_files_elsewhere_are_quantised_once(write, tmp_path, monkeypatch):
    copy = find_base(write(tmp_path / "a" / "merged", 0))
    monkeypatch.setattr(base_model, "load_base", lambda *a, **k: pytest.fail("quantised again"))
    assert find_base(write(tmp_path / "b" / "merged", 0)) == copy


def test_what_is_quantised_or_wanted_in_16_bits_is_its_own_copy(write, tmp_path):
    folder = write(tmp_path / "merged", 0)
    copy = find_base(folder)
    assert find_base(copy) == copy and find_base(folder, bits=16) == str(folder)
    assert packed(copy).dtype == torch.uint8 and packed(folder).dtype == torch.bfloat16


def test_a_model_that_is_not_there_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(ValueError, match="no-model' is no folder with a config.json here, .* as --model"):
        find_base(str(tmp_path / "no-model"))


@pytest.fixture
def hub(write, tmp_path, monkeypatch):
    """Put a tiny model of this seed into the Hub's cache: NAME at a revision, whose commit is the seed 40 times."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def hub(name: str, revision: str, seed: int):
        cached = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True, exist_ok=True)
        (cached / "refs" / revision).write_text(str(seed) * 40)
        write(cached / "snapshots" / (str(seed) * 40), seed)

    return hub


def test_two_owners_models_of_one_name_have_a_copy_each(hub):
    for owner in ("one", "two"):
        hub(f"{owner}/llama", "main", 0)
    copies = {find_base(f"{owner}/llama") for owner in ("one", "two", "one")}
    hub("one/llama", "main", 1)
    assert len(copies | {find_base("one/llama")}) == 3
    assert find_base("one/llama", bits=16) == "one/llama"


def test_a_revision_is_what_is_opened_and_has_a_copy_of_its_own(write, hub, tmp_path):
    hub("me/tiny", "main", 0)
    hub("me/tiny", "v1", 1)
    copies = [find_base("me/tiny", revision=revision) for revision in (None, "v1")]
    want = [packed(find_base(write(tmp_path / f"alone-{seed}", seed))) for seed in (0, 1)]
    assert all(torch.equal(packed(copy), weight) for copy, weight in zip(copies, want, strict=True))
    assert all("tiny-" in copy for copy in copies)
    assert torch.equal(packed(find_base("me/tiny", bits=16, revision="v1")), packed(write(tmp_path / "v1", 1)))
    with pytest.raises(ValueError, match=r"(?s)'me/tiny' at revision 'v2' is no folder .* as --model"):
        find_base("me/tiny", revision="v2")
