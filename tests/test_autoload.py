"""Programs that never name peft_mora open its adapters. Every claim here is about a fresh Python process."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from helpers import adapted
from peft import PeftModel, PeftType
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_mora import __main__
from peft_mora.registry import CHECKED


ROOT = Path(__file__).parent.parent
OURS = "[name for name in sys.modules if name.startswith('peft_mora')]"

# What a user's program would have in it: {base} and {adapter} are folders, `logits` is what gets compared.
OPEN = """
def logits(model):
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([[4, 5, 6, 7, 8]])).logits.float().flatten().tolist()
"""
WITH_PEFT = """
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32)
out["PeftModel"] = logits(PeftModel.from_pretrained(model, {adapter!r}))
out["AutoPeftModelForCausalLM"] = logits(AutoPeftModelForCausalLM.from_pretrained({adapter!r}, dtype=torch.float32))
"""
WITHOUT_PEFT = """
from transformers import AutoModelForCausalLM, pipeline

out["no peft yet"] = "peft" not in sys.modules
out["AutoModelForCausalLM"] = logits(AutoModelForCausalLM.from_pretrained({adapter!r}, dtype=torch.float32))
pipe = pipeline("text-generation", model={adapter!r}, tokenizer={base!r}, dtype=torch.float32)
out["pipeline"] = logits(pipe.model)
out["text"] = pipe("the cat sat on", max_new_tokens=3, do_sample=False)[0]["generated_text"]
"""


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    """A fresh Python in the repository's root; without `environment`, in the state a user's shell has."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PEFT_MORA_AUTOLOAD", "PYTHONWARNINGS")}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT.parent,  # not ROOT: nothing may be found only because the checkout is the working directory
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def answers(process: subprocess.Popen) -> dict:
    """What a program that ran to its end collected in `out`."""
    code, out, err = finish(process)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def program(body: str, **names: str) -> str:
    # `out` is made before and printed after the user's lines.
    return f"import json, sys, torch\nout = {{}}{OPEN}{body.format(**names)}\nprint(json.dumps(out))"


@pytest.fixture(scope="module")
def folders(llama_folder, tmp_path_factory) -> dict[str, str]:
    """`base` and a trained `adapter` that names it."""
    adapter = str(tmp_path_factory.mktemp("adapter"))
    save_adapter("mora", llama_folder, adapter)
    assert json.loads(Path(adapter, "adapter_config.json").read_text())["base_model_name_or_path"] == llama_folder
    return {"base": llama_folder, "adapter": adapter}


def save_adapter(method: str, base: str, folder: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted(method, base, task_type="CAUSAL_LM").save_pretrained(folder)


@pytest.fixture(scope="module")
def want(folders) -> torch.Tensor:
    """The logits of `logits`, from this process."""
    base = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32).eval()
    tokens = torch.tensor([[4, 5, 6, 7, 8]])
    with torch.no_grad():
        before = base(tokens).logits.flatten()
        after = PeftModel.from_pretrained(base, folders["adapter"]).eval()(tokens).logits.flatten()
    assert not torch.allclose(before, after, atol=0.1)  # a route that forgets the adapter would be seen
    return after


def assert_same(got: list[float], want: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(got), want, rtol=1e-5, atol=1e-5)


def test_a_program_that_never_names_us_opens_an_adapter_by_every_route(folders, want):
    processes = [start("-c", program(body, **folders)) for body in (WITH_PEFT, WITHOUT_PEFT)]
    with_peft, without_peft = [answers(process) for process in processes]
    assert without_peft["no peft yet"]
    assert without_peft["text"].startswith("the cat sat on")
    assert_same(with_peft["PeftModel"], want)
    assert_same(with_peft["AutoPeftModelForCausalLM"], want)
    assert_same(without_peft["AutoModelForCausalLM"], want)
    assert_same(without_peft["pipeline"], want)


def test_a_spawned_child_opens_an_adapter(folders, want, tmp_path, monkeypatch):
    Path(tmp_path, "child_of_autoload.py").write_text(
        f"import sys, torch\n{OPEN}\n"
        "def work(method, base, adapter):\n"  # `method` is an enum member: unpickling it needs the registration too
        "    out = {}\n    exec(PROGRAM.format(base=base, adapter=adapter), dict(globals(), out=out))\n"
        "    return str(method.value), out\n"
        f"PROGRAM = {WITH_PEFT!r}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import child_of_autoload

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        task = pool.submit(child_of_autoload.work, PeftType.MORA, folders["base"], folders["adapter"])
        method, out = task.result(timeout=300)
    assert method == "MORA"
    assert_same(out["PeftModel"], want)


# --- switched off, and `python -m peft_mora` ---


OFF = """
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32)
try:
    PeftModel.from_pretrained(model, {adapter!r})
except KeyError as error:
    out["opening"] = repr(error)

import peft.tuners._buffer_dict as moved
del moved.BufferDict
try:
    import peft_mora
except ImportError as error:
    out["importing"] = str(error)
"""


@pytest.fixture(scope="module")
def off_and_runner(folders, tmp_path_factory) -> tuple[dict, dict, Path]:
    """With autoload switched off: a program that fails to open an adapter, and one under `python -m peft_mora`."""
    script = tmp_path_factory.mktemp("program") / "evaluate.py"
    script.write_text(program("out['argv'], out['path'] = sys.argv, sys.path[0]\n" + WITH_PEFT, **folders))
    off = start("-c", program(OFF, **folders), PEFT_MORA_AUTOLOAD="0")
    run = start("-m", "peft_mora", str(script), "--lr", "1", PEFT_MORA_AUTOLOAD="0")
    return answers(off), answers(run), script


def test_switched_off_it_is_off(off_and_runner):
    assert off_and_runner[0]["opening"] == "KeyError('MORA')"


def test_the_runner_needs_no_autoload(off_and_runner, want):
    _, out, script = off_and_runner
    assert out["argv"] == [str(script), "--lr", "1"] and out["path"] == str(script.parent)
    assert_same(out["PeftModel"], want)
    assert_same(out["AutoPeftModelForCausalLM"], want)


def test_a_peft_without_what_we_build_on_is_named_in_one_line(off_and_runner):
    message = off_and_runner[0]["importing"]
    assert "\n" not in message and f"checked with peft {CHECKED} and does not fit peft {peft.__version__} " in message
    assert "BufferDict" in message


@pytest.fixture
def runner(monkeypatch, tmp_path, capsys):
    """Call `python -m peft_mora ...` here: its import is what costs the time and is done. Gives (status, stdout)."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["peft_mora", *arguments])
        status: object = 0
        try:
            __main__.main()
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().out

    return run


TELL = "import sys\nprint(__name__, sys.argv[1:], 'peft_mora' in sys.modules)\n"


def test_the_runner_runs_a_file_as_python_does(runner, tmp_path):
    (tmp_path / "beside.py").write_text("HERE = 'found beside the file'")
    (tmp_path / "script.py").write_text(TELL + "import beside; print(beside.HERE); sys.exit(3)")
    status, out = runner(str(tmp_path / "script.py"), "a", "--b")
    assert status == 3 and out == "__main__ ['a', '--b'] True\nfound beside the file\n"


def test_the_runner_runs_a_module(runner, tmp_path):
    (tmp_path / "a_module_to_run.py").write_text(TELL + "print(sys.argv[0])")
    status, out = runner("-m", "a_module_to_run", "-x")
    assert status == 0 and out == f"__main__ ['-x'] True\n{tmp_path / 'a_module_to_run.py'}\n"
    assert "needs the name of a module" in str(runner("-m")[0])


def test_the_runner_runs_an_installed_command(runner, tmp_path):
    (tmp_path / "its_code.py").write_text("import sys\ndef cli():\n    print(sys.argv)\n    return 4\n")
    info = tmp_path / "a_distribution-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-distribution\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nevaluate_it = its_code:cli\n")
    importlib.invalidate_caches()
    assert runner("evaluate_it", "--tasks", "x") == (4, "['evaluate_it', '--tasks', 'x']\n")


def test_the_runner_explains_itself(runner):
    status, out = runner("--help")
    assert status == 0 and out.startswith("usage: python -m peft_mora PROGRAM") and "lm_eval" in out
    assert runner() == (2, out)
    assert runner("no_such_program", "-x") == (
        "no_such_program: no such file, and no installed package has a command of that name.",
        "",
    )


# --- what it costs and what it leaves alone ---


def test_a_python_without_torch_loads_nothing_of_ours():
    assert finish(start("-c", f"import sys; print({OURS})"))[:2] == (0, "[]\n")


QUIET = f"""
import importlib.util, inspect, threading, warnings
from importlib.machinery import PathFinder

out["after torch"] = {OURS}, "peft" in sys.modules, "transformers" in sys.modules

spec = importlib.util.find_spec("peft")  # how transformers, accelerate and trl ask whether PEFT is there
finders = [f for f in sys.meta_path if type(f).__module__ == "peft_mora_autoload"]
inner = finders[0].find_spec("peft.tuners", spec.submodule_search_locations)
plain = PathFinder.find_spec("peft.tuners", spec.submodule_search_locations)
out["finders"] = len(finders)
out["same spec"] = [(s.name, s.origin, s.cached, s.submodule_search_locations) for s in (inner, plain)]
out["same source"] = [s.loader.get_source("peft.tuners") for s in (inner, plain)]
out["is_package"] = inner.loader.is_package("peft.tuners")
out["elsewhere"] = finders[0].find_spec("peft.tuners.lora", ["/"]), finders[0].find_spec("peft", None)
out["after find_spec"] = {OURS}, "peft" in sys.modules
import peft_mora_autoload
peft_mora_autoload.install()
out["installed twice"] = sum(type(f).__module__ == "peft_mora_autoload" for f in sys.meta_path)

go, failures = threading.Event(), []
def race(line):
    go.wait()
    try:
        exec(line)
    except BaseException as error:
        failures.append(repr(error))
# Not `import peft.tuners`: beside `import peft` in another thread that fails in PEFT itself, without us.
lines = ["import peft", "import peft_mora", "from peft import PeftModel", "from peft_mora import MoraConfig"]
threads = [threading.Thread(target=race, args=(line,)) for line in lines * 2]
for thread in threads: thread.start()
go.set()
for thread in threads: thread.join(120)
out["race"] = failures, [thread.name for thread in threads if thread.is_alive()]

import peft
def registered():
    return [m for m in peft.PeftType].count("MORA"), peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["MORA"].__module__
out["registered"] = registered()
tuners = sys.modules["peft.tuners"]
out["loaders"] = [type(l).__name__ for l in (tuners.__spec__.loader, tuners.__loader__, peft.__spec__.loader)]
out["inspect"] = inspect.getsource(tuners) == out["same source"][1]
out["find_spec after"] = importlib.util.find_spec("peft.tuners") is tuners.__spec__

importlib.reload(peft.tuners)
importlib.reload(peft)
out["reloaded"] = registered()

def forget():
    for name in [n for n in sys.modules if n.partition(".")[0] in ("peft", "peft_mora")]:
        del sys.modules[name]
old = peft
forget()
sys.path.insert(0, STUB)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft
    import peft.tuners.lora
out["broken"] = [str(w.message) for w in caught if "peft_mora" in str(w.message)]
out["broken knows"] = [name in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING for name in ("LORA", "MORA")]
sys.path.remove(STUB)
forget()
import peft
out["imported anew"] = registered(), peft is not old
"""


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> dict:
    """One process that imports torch, looks for PEFT, imports it from several threads, and imports it again: beside a
    peft_mora that does not work, and beside ours."""
    stub = tmp_path_factory.mktemp("broken")
    (stub / "peft_mora").mkdir()
    (stub / "peft_mora" / "__init__.py").write_text("raise RuntimeError('this one is broken')")
    body = f"STUB = {str(stub)!r}\n{QUIET}".replace("{", "{{").replace("}", "}}")
    return answers(start("-W", "error:peft_mora", "-c", program(body)))  # our warning would be an error


def test_importing_torch_loads_neither_peft_nor_us(quiet):
    assert quiet["after torch"] == [["peft_mora_autoload"], False, False]
    assert quiet["finders"] == quiet["installed twice"] == 1


def test_looking_for_peft_imports_nothing_and_finds_what_python_finds(quiet):
    assert quiet["after find_spec"] == [["peft_mora_autoload"], False]
    assert quiet["same spec"][0] == quiet["same spec"][1] and quiet["is_package"]
    assert quiet["same source"][0] == quiet["same source"][1]
    assert quiet["elsewhere"] == [None, None]


def test_threads_that_race_to_import_all_succeed(quiet):
    assert quiet["race"] == [[], []]
    assert quiet["registered"] == [1, "peft_mora.mora"]


def test_an_imported_peft_looks_as_if_we_had_not_been_there(quiet):
    assert quiet["loaders"] == ["SourceFileLoader"] * 3
    assert quiet["inspect"] and quiet["find_spec after"]


def test_a_reloaded_and_a_new_peft_know_the_methods(quiet):
    assert quiet["reloaded"] == [1, "peft_mora.mora"]
    assert quiet["imported anew"] == [[1, "peft_mora.mora"], True]


def test_a_broken_peft_mora_is_one_warning_and_peft_works(quiet):
    (message,) = quiet["broken"]
    assert "peft_mora could not load" in message and "this one is broken" in message
    assert "PEFT_MORA_AUTOLOAD=0" in message
    assert quiet["broken knows"] == [True, False]


def test_plain_lm_eval_opens_an_adapter(llama_folder, tmp_path):
    """A sparse LORI without its projection in the file, which is the farthest from a LoRA."""
    pytest.importorskip("lm_eval")
    folders = {"base": llama_folder, "adapter": str(tmp_path / "adapter")}
    save_adapter("lori-sparse", llama_folder, folders["adapter"])
    docs = [{"q": "the cat sat on the", "right": 0}, {"q": "a big red dog ran", "right": 1}, {"q": "no", "right": 0}]
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps(doc) for doc in docs))
    (tmp_path / "tiny.yaml").write_text(
        f"""
task: tiny_of_autoload
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "docs.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["log", "mat"]
doc_to_target: right
"""
    )
    code, _, err = finish(
        start(
            *("-m", "lm_eval", "--model", "hf", "--tasks", "tiny_of_autoload", "--include_path", str(tmp_path)),
            *("--model_args", f"pretrained={folders['base']},peft={folders['adapter']},dtype=float32"),
            *("--device", "cpu", "--batch_size", "1", "--log_samples", "--output_path", str(tmp_path / "results")),
            HF_DATASETS_OFFLINE="1",
            HF_DATASETS_CACHE=str(tmp_path / "cache"),
        )
    )
    assert code == 0, err
    (file,) = (tmp_path / "results").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]

    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    base = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folders["adapter"]).eval()
    choices = tokenizer(["log", "mat"], return_tensors="pt").input_ids.flatten()
    assert len(samples) == len(docs)
    for sample in samples:
        tokens = tokenizer(sample["doc"]["q"], return_tensors="pt").input_ids
        got = torch.tensor([float(response[0][0]) for response in sample["resps"]])
        with torch.no_grad(), model.disable_adapter():
            base_alone = log_probabilities(model, tokens, len(tokenizer))[choices]
        with torch.no_grad():
            torch.testing.assert_close(
                got, log_probabilities(model, tokens, len(tokenizer))[choices], rtol=0, atol=1e-4
            )
        assert (got - base_alone).abs().max() > 1e-3


def log_probabilities(model, tokens: torch.Tensor, words: int) -> torch.Tensor:
    """Of the next token. lm_eval cuts the model's vocabulary down to the tokenizer's."""
    return model(tokens).logits[0, -1, :words].log_softmax(-1)
