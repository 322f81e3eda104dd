"""Every Python block of README.md and docs/ runs, over a tiny 4-bit model, and every command is one that exists."""

import re
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import METHODS, RECIPES, load_recipe, quantized
from markdown.extensions.toc import slugify
from peft import PeftModel, get_peft_model
from test_trl import texts
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import peft_mora_command
from peft_mora_command import VERBS, parse


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs(block, llama_folder, tmp_path, monkeypatch):
    if "sentence_transformers" in block:
        pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    names = {
        "model": quantized(llama_folder),
        "base": quantized(llama_folder),
        "tokenizer": AutoTokenizer.from_pretrained(llama_folder),
        "train_dataset": texts(),
        "args": SFTConfig(output_dir=str(tmp_path / "trainer"), **options),
        "SFTTrainer": SFTTrainer,
        "SFTConfig": partial(SFTConfig, **options),
        "PeftModel": PeftModel,
        "get_peft_model": get_peft_model,
    }
    exec(compile(re.sub(r"Qwen/Qwen3-(Embedding-)?0\.6B", llama_folder, block), "docs", "exec"), names)


PROGRAMS = [path for path in (*RECIPES.glob("*.py"), *RECIPES.glob("measure/*.py")) if path.is_file()]


def test_every_command_on_the_pages_and_in_the_programs_is_one_that_they_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peft_mora_command, "check_device", lambda device: None)  # pages have cuda
    commands = [
        shlex.split(command, comments=True)
        for page in (*PAGES, *PROGRAMS)
        for command in re.findall(r"(?:^|`)python (recipes/[^`\n]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
        if not command.endswith("\\")
    ]
    recipes = {program: load_recipe(program[len("recipes/") : -len(".py")]) for program, *_ in commands}
    for program, *arguments in commands:
        if arguments and hasattr(recipes[program], "parse"):  # not sft.py, whose flags are TRL's
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            recipes[program].parse()
    assert len(commands) > 30 and len(recipes) == len(PROGRAMS)


def test_every_peft_mora_command_on_the_pages_is_one_that_it_takes():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    commands = [shlex.split(line) for line in re.findall(r"^peft-mora (.+)$", text, re.MULTILINE)]
    for verb, *arguments in commands:
        if verb != "run":
            parse(verb, arguments)
    assert {verb for verb, *_ in commands} >= VERBS.keys()


def test_every_program_that_a_page_names_is_there():
    text = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "Makefile", ROOT / "CHANGELOG.md"])
    named = set(re.findall(r"recipes/[\w/]+\.py", text))
    assert len(named) > 10 and not [path for path in named if not (ROOT / path).exists()]


def test_every_link_between_the_pages_leads_somewhere():
    """`make docs` checks the site's; this one needs a tenth of a second, and knows the README and its like too."""
    pages = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
    headings = {
        page: {
            slugify(re.sub("[`*]", "", line), "-") for line in re.findall(r"(?m)^#+ (.+)$", page.read_text("utf-8"))
        }
        for page in pages
    }
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text("utf-8"))
    ]
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in headings[target], f"{page.name}: {link}"
    assert len(links) > 100


def test_the_picture_of_forgetting_shows_runs_that_the_tables_have(run_recipe, tmp_path):
    forgetting = load_recipe("measure/forgetting")
    page = (ROOT / "docs" / "projection.md").read_text(encoding="utf-8")
    for path in forgetting.MATRICES:
        tasks, scores, ratios = forgetting.read(path, "greedy")
        assert tasks == ["dbpedia", "SST-2", "yahoo", "agnews"] and len(scores) == len(ratios) == 4
        last = " | ".join(f"{value:.2f}".lstrip("0") for value in scores[-1])
        assert re.search(rf"\| {re.escape(last)} \|.* {54.799 * ratios[-1]:.1f} \|", page)
    run_recipe(forgetting, "--output", tmp_path / "forgetting.svg")
    drawn = (tmp_path / "forgetting.svg").read_text(encoding="utf-8")
    shown = (ROOT / "docs" / "images" / "forgetting.svg").read_text(encoding="utf-8")
    assert drawn.count("<use") == shown.count("<use") > 100  # as many glyphs


def test_every_config_field_with_its_default_is_on_its_page():
    from dataclasses import MISSING, fields

    from peft_mora import METHODS
    from peft_mora.base import AdapterConfig

    shared = {field.name for field in fields(AdapterConfig)} - {"r", "alpha", "dropout"}
    for config in (method.config for method in METHODS.values()):
        page = (ROOT / "docs" / f"{config.__module__.split('.')[1]}.md").read_text(encoding="utf-8")
        for field in fields(config):
            if field.name in shared:
                continue
            assert f"`{field.name}`" in page, (config.__name__, field.name)
            if field.default is not MISSING and field.default is not None:
                rows = [line for line in page.splitlines() if line.startswith("|") and f"`{field.name}`" in line]
                shown = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
                if isinstance(field.default, float):
                    shown = f"{field.default:g}"
                assert any(shown in row for row in rows), (config.__name__, field.name)


def test_methods_md_has_a_row_for_every_method_callback_and_rule():
    """Also what each row says of merging and routing."""
    import peft_mora
    import trl_callbacks
    from peft_mora.merging import RULES
    from peft_mora.routed import RoutedConfig

    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = {row[0].strip("`"): row for row in (re.split(r" *\| *", line.strip("| ")) for line in text.splitlines())}
    for name, method in peft_mora.METHODS.items():
        _, _, _, merges, routed, page = rows[method.config.__name__]
        forms = [form.merges for key, form in METHODS.items() if key.split("-")[0] == name]
        assert (merges == "no") == (not any(forms)) and (not all(forms) or "exactly" in merges), name
        assert routed.startswith("no") == (not issubclass(method.config, RoutedConfig)), name
        page_name = method.config.__module__.split(".")[1]
        assert page == f"[{page_name}.md]({page_name}.md)"
    assert [name for name in trl_callbacks.__all__ if name.endswith("Callback") and name not in rows] == []
    assert [rule for rule in RULES if f'rule="{rule}"' not in text] == []
    assert not [path for path in re.findall(r"\]\((\w+\.md)\)", text) if not (ROOT / "docs" / path).exists()]
