"""Programs that never name peft_mora open its adapters. Every claim here is about a fresh Python process."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from helpers import WORDS, adapted
from peft import PeftModel, PeftType
from transformers import AutoModelForCausalLM

import peft_mora_autoload
from peft_mora import TaskRouter
from peft_mora.registry import CHECKED
from peft_mora_command import main


ROOT = Path(__file__).parent.parent
OURS = "[name for name in sys.modules if name.startswith('peft_mora')]"

# What a user's program would have in it: {base}, {adapter} and {sparse} are folders, `logits` is what gets compared.
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
routed = pipeline("text-generation", model={routed!r}, tokenizer={base!r}, dtype=torch.float32)
out["routed pipeline"] = logits(routed.model)
out["routed text"] = routed("the cat sat on", max_new_tokens=3, do_sample=False)[0]["generated_text"]

from lm_eval.models.huggingface import HFLM
out["lm_eval"] = logits(HFLM({base!r}, peft={sparse!r}, dtype="float32", device="cpu", batch_size=1).model)
lm = HFLM({base!r}, peft={routed!r}, dtype="float32", device="cpu", batch_size=2)
out["routed lm_eval"] = logits(lm.model)
from lm_eval.api.instance import Instance
asked = [("the a cat dog", " sat"), ("north south", " east west yes no red")]  # of two lengths, padded without a mask
asked = [Instance("loglikelihood", dict(), pair, i) for i, pair in enumerate(asked)]
out["routed scores"] = [score for score, _ in lm.loglikelihood(asked, disable_tqdm=True)]
"""


def answers(*arguments: str, **environment: str):
    """What a fresh Python outside the checkout, which runs to its end, prints last, as JSON; without `environment`, in
    the state a user's shell has."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PEFT_MORA_AUTOLOAD", "PYTHONWARNINGS")}
    env = {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT.parent, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def program(body: str, **names: str) -> str:
    # `out` is made before and printed after the user's lines.
    return f"import json, sys, torch\nout = {{}}{OPEN}{body.format(**names)}\nprint(json.dumps(out))"


@pytest.fixture(scope="module")
def folders(llama_folder, tmp_path_factory) -> dict[str, str]:
    """`base`, a trained `adapter` that names it, a `sparse` LORI that draws its projection again, and a MORA adapter
    of two tasks with its router, `routed`."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, method in (("adapter", "mora"), ("sparse", "lori-sparse")):
        base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
        adapted(method, base, task_type="CAUSAL_LM").save_pretrained(folder / name)
    saved = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == llama_folder
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    router = TaskRouter(adapted("mora", base, tasks=2, task_type="CAUSAL_LM"), layers=1, false_alarms=0)
    for seed, (name, words) in enumerate({"initial": WORDS[:8], "task1": WORDS[12:]}.items()):
        picks = torch.randint(8, (20, 5), generator=torch.Generator().manual_seed(seed)).tolist()
        router.add_task(name, [" ".join(words[i] for i in row) for row in picks])
    router.attach()
    router.save_pretrained(folder / "routed")
    return {"base": llama_folder, **{name: str(folder / name) for name in ("adapter", "sparse", "routed")}}


@pytest.fixture(scope="module")
def want(folders) -> dict[str, torch.Tensor]:
    """The logits of `logits` with `adapter` and `sparse`, from this process."""
    tokens = torch.tensor([[4, 5, 6, 7, 8]])
    base = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32).eval()
    found = {}
    with torch.no_grad():
        before = base(tokens).logits.flatten()
        for name in ("adapter", "sparse"):
            model = PeftModel.from_pretrained(base, folders[name]).eval()
            found[name] = model(tokens).logits.flatten()
            assert not torch.allclose(before, found[name], atol=0.1)  # a route that forgets the adapter would be seen
            base = model.unload()
        model = PeftModel.from_pretrained(base, folders["routed"], "bank").eval()
        TaskRouter.of(model).detach()
        found["routed"] = model(tokens, adapter_names=["adapter/initial"]).logits
        found["not routed"] = model(tokens).logits
        found["routed text"] = model.generate(
            torch.tensor([[4, 6, 8, 10]]), adapter_names=["adapter/initial"], max_new_tokens=3, do_sample=False
        )
        scores = []
        for name, ids, n in (("initial", [4, 5, 6, 7, 8], 1), ("task1", [20, 21, 22, 23, 18, 19, 14], 5)):
            logs = model(torch.tensor([ids]), adapter_names=[f"adapter/{name}"]).logits[0, :, :24].log_softmax(-1)
            scores.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids))))
        found["routed scores"] = torch.tensor(scores)
    return found


def assert_same(got: list[float], want: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(got), want, rtol=1e-5, atol=1e-5)


def test_a_program_that_names_neither_us_nor_peft_opens_an_adapter_also_in_lm_eval(folders, want):
    out = answers("-c", program(WITHOUT_PEFT, **folders))
    assert out["no peft yet"] and out["text"].startswith("the cat sat on")
    assert_same(out["AutoModelForCausalLM"], want["adapter"])
    assert_same(out["pipeline"], want["adapter"])
    assert_same(out["routed pipeline"], want["routed"].flatten())
    assert not torch.allclose(want["routed"], want["not routed"], atol=0.1)
    new = want["routed text"][0, 4:].tolist()
    assert out["routed text"].split()[4:] == [["<pad>", "<s>", "</s>", "<unk>", *WORDS][i] for i in new if 3 < i < 24]
    words = len(out["lm_eval"]) // 5  # lm_eval cuts the model's vocabulary down to the tokenizer's
    assert_same(out["lm_eval"], want["sparse"].view(5, -1)[:, :words].flatten())
    assert_same(out["routed lm_eval"], want["routed"].view(5, -1)[:, :words].flatten())
    assert_same(out["routed scores"], want["routed scores"])


@pytest.mark.slow
def test_a_spawned_child_that_names_peft_alone_opens_an_adapter(folders, want, tmp_path, monkeypatch):
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
    for got in out.values():
        assert_same(got, want["adapter"])
    assert len(out) == 2


# Switched off, and `python -m peft_mora`

OFF = """
from peft import PeftModel

try:
    PeftModel.from_pretrained(torch.nn.Linear(1, 1), {adapter!r})
except KeyError as error:
    out["opening"] = repr(error)

def hosts():
    return [name for name in ("trl", "matplotlib", "triton", "bitsandbytes", "trl_callbacks") if name in sys.modules]
before = hosts()
import peft.tuners._buffer_dict as moved
BufferDict = moved.BufferDict
del moved.BufferDict
try:
    import peft_mora
except ImportError as error:
    out["importing"] = str(error)
moved.BufferDict = BufferDict
import peft_mora
out["new hosts"] = [name for name in hosts() if name not in before]
"""


@pytest.fixture(scope="module")
def off(folders) -> dict:
    return answers("-c", program(OFF, **folders), PEFT_MORA_AUTOLOAD="0")


@pytest.mark.slow
def test_switched_off_it_is_off(off):
    assert off["opening"] == "KeyError('MORA')"


@pytest.mark.slow
def test_a_peft_without_what_we_build_on_is_named_in_one_line(off):
    message = off["importing"]
    assert "\n" not in message and f"checked with peft {CHECKED} and does not fit peft {peft.__version__} " in message
    assert "BufferDict" in message


@pytest.mark.slow
def test_importing_the_package_brings_no_host_along(off):
    assert off["new hosts"] == []


@pytest.mark.slow
def test_the_runner_needs_no_autoload(folders, want, tmp_path):
    script = tmp_path / "evaluate.py"
    script.write_text(program("out['argv'], out['path'] = sys.argv, sys.path[0]\n" + WITH_PEFT, **folders))
    out = answers("-m", "peft_mora", str(script), "--lr", "1", PEFT_MORA_AUTOLOAD="0")
    assert out["argv"] == [str(script), "--lr", "1"] and out["path"] == str(script.parent)
    assert_same(out["PeftModel"], want["adapter"])
    assert_same(out["AutoPeftModelForCausalLM"], want["adapter"])


@pytest.fixture
def runner(monkeypatch, tmp_path, capsys):
    """Call `python -m peft_mora ...` here: its import is what costs the time and is done. Gives (status, stdout)."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["peft_mora", *arguments])
        status: object = 0
        try:
            main()
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
    for run in ([], ["run"]):
        assert runner(*run, "evaluate_it", "--tasks", "x") == (4, "['evaluate_it', '--tasks', 'x']\n")


def test_the_runner_explains_itself(runner):
    status, out = runner("--help")
    assert status == 0 and out.startswith("usage: peft-mora VERB") and "python -m peft_mora PROGRAM" in out
    assert runner() == (2, out)
    assert runner("run", "--help")[1] in out and runner("run")[0] == 2
    assert runner("no_such_program", "-x") == (
        "no_such_program: no such file, and no installed package has a command of that name.",
        "",
    )


# What it costs and what it leaves alone


def test_a_python_without_torch_loads_nothing_of_ours():
    assert answers("-c", f"import sys; print({OURS})") == []


QUIET = f"""
import importlib.util, inspect, threading, warnings
from importlib.machinery import PathFinder

out["after torch"] = {OURS}, "peft" in sys.modules, "transformers" in sys.modules

spec = importlib.util.find_spec("peft")  # how transformers, accelerate and trl ask whether PEFT is there
finders = [f for f in sys.meta_path if type(f).__module__ == "peft_mora_autoload"]
inner = finders[0].find_spec("peft.tuners", spec.submodule_search_locations)
plain = PathFinder.find_spec("peft.tuners", spec.submodule_search_locations)
out["finders"] = len(finders)
one, other = ((s.name, s.origin, s.cached, s.submodule_search_locations) for s in (inner, plain))
source, same = (s.loader.get_source("peft.tuners") for s in (inner, plain))
out["same spec and source"] = one == other and source == same
out["is_package"] = inner.loader.is_package("peft.tuners")
inside = inner.submodule_search_locations
out["elsewhere"] = finders[0].find_spec("peft.tuners.lora", inside), finders[0].find_spec("peft", None)
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
out["inspect"] = inspect.getsource(tuners) == source
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
    return answers("-W", "error:peft_mora", "-c", program(body))  # our warning would be an error


KNOWN = [1, "peft_mora.mora"]
CLAIMS = {
    "importing torch loads neither PEFT nor us": {"after torch": [["peft_mora_autoload"], False, False], "finders": 1},
    "looking for PEFT imports nothing": {"after find_spec": [["peft_mora_autoload"], False], "installed twice": 1},
    "it finds what Python finds": {"same spec and source": True, "is_package": True, "elsewhere": [None, None]},
    "threads that race to import all succeed": {"race": [[], []], "registered": KNOWN},
    "an imported PEFT is as without us": {
        "loaders": ["SourceFileLoader"] * 3, "inspect": True, "find_spec after": True,
    },
    "a reloaded and a new PEFT know the methods": {"reloaded": KNOWN, "imported anew": [KNOWN, True]},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS)
def test_in_a_process_that_imports_torch_and_then_peft(claim, quiet):
    assert {key: quiet[key] for key in CLAIMS[claim]} == CLAIMS[claim]


@pytest.mark.slow
def test_a_broken_peft_mora_is_one_warning_and_peft_works(quiet):
    (message,) = quiet["broken"]
    assert "peft_mora could not load" in message and "this one is broken" in message
    assert "PEFT_MORA_AUTOLOAD=0" in message
    assert quiet["broken knows"] == [True, False]


def test_a_warning_that_is_an_error_does_not_stop_peft_s_own_import(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft_mora", None)  # as one that does not fit this PEFT
    with pytest.warns(UserWarning, match="peft_mora could not load.*PEFT_MORA_AUTOLOAD=0"):
        peft_mora_autoload.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft_mora_autoload.install()
    assert "peft_mora could not load, so PEFT does not know its adapters here" in capsys.readouterr().err
