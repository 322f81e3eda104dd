"""What each method costs on this card: a training step beside PEFT's LoRA, one layer, MORA's gate with its kernels.

python recipes/gpu_report.py                                      # minutes on a card, nothing is downloaded
python recipes/gpu_report.py --shapes tiny --device cpu --steps 2 # the same code, as a test runs it

Models are made from configs, with random weights: 0.6b is Qwen3-0.6B's shape, 7b Llama-3-8B's with 4 of its 32 layers,
both with 32,000 words, so their numbers compare methods and are no model's. Their linear layers are in NF4 where
bitsandbytes can do that on the device. A step is forward, backward and AdamW; its peak is all that tensors take, the
base too (on a CPU: what comes on top). The methods come one after the other on the same base, LoRA again at the end:
how far its two rows differ is how far others may by chance. "fused" is MORA with its gate as one Triton kernel each
way (`MoraLinear.fused_gate`), where Triton is installed; on a CPU it is torch's operations too.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import bench_layers
from peft import get_peft_model
from shared import runs
from shared.training import BENCH, bench_config, bench_rank
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from peft_mora.mora import MoraLinear
from peft_mora.routing import gated_softmax, gated_softmax_backward


Row = dict[str, Any]
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 64},
    "0.6b": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28, "vocab_size": 32000,
             "tie_word_embeddings": True},
    "7b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
           "num_key_value_heads": 8, "num_hidden_layers": 4, "vocab_size": 32000},
}  # fmt: skip
FUSED = ", fused"  # behind the name of an arm
GATES = (8, 16, 32, 64, 128, 256)  # experts: a task's block, and banks
COLUMNS = {"step, ms": "step_ms", "tokens/s": "tokens_per_s", "time by LoRA's": "ratio", "peak MiB": "peak_mib"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["0.6b", "7b"], choices=SHAPES, help="(%(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(BENCH), choices=BENCH, help="beside LoRA (all)")
    parser.add_argument("--r", type=bench_rank, default=16, help="rank of all methods (%(default)s)")
    parser.add_argument("--batch-size", type=runs.count, default=8, help="samples a step (%(default)s)")
    parser.add_argument("--tokens", type=runs.count, default=512, help="of each sample (%(default)s)")
    parser.add_argument("--steps", type=runs.count, default=10, help="timed, after three others (%(default)s)")
    parser.add_argument(
        "--device", type=device, default="cuda", help="cuda, cuda:1, …; cpu only to try it (%(default)s)"
    )
    parser.add_argument("--output", type=runs.folder, default="out/gpu_report", metavar="DIR", help="(%(default)s)")
    args = parser.parse_args()
    if twice := next((name for name in args.methods if args.methods.count(name) > 1), None):
        parser.error(f"--methods: {twice} is there twice; name each once")
    return args


def device(text: str) -> str:
    """As the type of an argument; whether there is a card is asked later."""
    try:
        torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of torch: cuda, cuda:1, cpu") from error
    return text


def make_base(shape: str, device: str) -> tuple[Any, str]:
    """(the model, frozen, in training mode; what its linear layers are in)."""
    config = AutoConfig.for_model(**SHAPES[shape])

    def plain() -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return model.requires_grad_(False).train()

    try:
        return four_bit(plain(), device), "NF4"
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, NotImplementedError) as error:
        print(f"bitsandbytes has no NF4 on {device} ({' '.join(str(error).split())[:100]}): the base is in bfloat16")
        return plain(), "bfloat16"


def four_bit(model: Any, device: str) -> Any:
    """The linear layers but the output head in NF4, as `nf4_config` says."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            new = Linear4bit(module.in_features, module.out_features, False, torch.bfloat16, device="meta")
            weight = module.weight.data.cpu()  # it is quantised on its way to the device
            new.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
            model.set_submodule(name, new.to(device).train())
    model.is_loaded_in_4bit = True  # what PEFT asks
    return model


def timed(step: Callable[[], Any], steps: int, device: str) -> list[float]:
    """Seconds of each step; three before them are not counted."""
    seconds = []
    for _ in range(steps + 3):
        runs.wait(device)
        begin = time.perf_counter()
        step()
        runs.wait(device)
        seconds.append(time.perf_counter() - begin)
    return seconds[3:]


def measure(base: Any, method: str, ids: torch.Tensor, args: argparse.Namespace) -> Row:
    """One method's training step over the shared base, which is given back bare."""
    torch.manual_seed(0)
    model = get_peft_model(base, bench_config(method.removesuffix(FUSED), args.r))
    for layer in model.modules():
        if isinstance(layer, MoraLinear):
            layer.fused_gate = method.endswith(FUSED)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = statistics.median(timed(step, args.steps, args.device))
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(args.device)
        step()
        peak = torch.cuda.max_memory_allocated(args.device) / 2**20
    else:
        peak = bench_layers.peak_mib(step)
    row = {
        "arm": method, "step_ms": 1e3 * seconds, "tokens_per_s": ids.numel() / seconds, "peak_mib": peak,
        "parameters": sum(parameter.numel() for parameter in trainable),
    }  # fmt: skip
    model.unload()
    return row


def profile(step: Callable[[], Any], device: str) -> tuple[Counter, Counter]:
    """Of one step: kernel -> how often it is launched, kernel -> its microseconds. On a CPU: of torch's operations."""
    for _ in range(3):
        step()
    runs.wait(device)
    on_card = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_card else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        runs.wait(device)
    launches, micros = Counter(), Counter()
    kind = torch.autograd.DeviceType.CUDA if on_card else torch.autograd.DeviceType.CPU
    for event in profiler.events():
        if event.device_type == kind and (on_card or event.name.startswith("aten::")):
            launches[event.name] += 1
            micros[event.name] += event.self_device_time_total if on_card else event.self_cpu_time_total
    return launches, micros


def layer_rows(args: argparse.Namespace, shape: str) -> list[Row]:
    """Forward and backward of a step's tokens through the layers of bench_layers.py, over one base's q_proj."""
    size = SHAPES[shape]["hidden_size"]
    base = nn.Linear(size, size, bias=False, device=args.device, dtype=torch.bfloat16)
    x = torch.randn(args.batch_size, args.tokens, size, device=args.device, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn_like(x)
    rows, layers = [], bench_layers.arms(base, args.r, compiled=False)
    if find_spec("triton"):
        fused = layers[f"mora lean{FUSED}"] = copy.copy(layers["mora lean"])
        fused.fused_gate = True
    for arm, layer in layers.items():
        step = lambda layer=layer: layer(x).backward(g)  # noqa: E731
        launches, micros = profile(step, args.device)
        wall = statistics.median(timed(step, args.steps, args.device))
        rows.append({"arm": arm, "launches": launches.total(), "device_us": micros.total(), "wall_us": 1e6 * wall})
    return rows


def gate(
    args: argparse.Namespace, experts: int, top_k: int, fused: bool = False, calls: int = 1
) -> Callable[[], None]:
    """MORA's gate on a step's tokens, forward and its backward, as its layers call it."""
    h = torch.randn(args.batch_size * args.tokens, experts, device=args.device, dtype=torch.bfloat16)
    grad = torch.randn_like(h)

    def step() -> None:
        for _ in range(calls):
            index = gated_softmax(h, top_k, 0.1, fused=fused)[2]
            gated_softmax_backward(h, index, grad, 0.1, fused=fused)

    return step


def gate_rows(args: argparse.Namespace, top_k: int) -> list[Row]:
    """A row a kernel, the longest first."""
    launches, micros = profile(gate(args, args.r, top_k), args.device)
    return [{"kernel": name, "launches": launches[name], "us": us} for name, us in micros.most_common()]


def fused_rows(args: argparse.Namespace) -> list[Row]:
    """Torch's operations and the Triton kernels at each size: the device's time, and the clock's of 20 in a row."""
    rows = []
    for experts in GATES:
        for top_k in (experts, experts // 4):
            row: Row = {"gate": f"{top_k} of {experts}"}
            for name, fused in (("torch", False), ("triton", True)):
                _, micros = profile(gate(args, experts, top_k, fused), args.device)
                seconds = timed(gate(args, experts, top_k, fused, calls=20), args.steps, args.device)
                row |= {f"{name}_us": micros.total(), f"{name}_wall": 1e6 * statistics.median(seconds) / 20}
            row["ratio"] = row["triton_wall"] / row["torch_wall"]
            rows.append(row | {"wins": "triton" if row["ratio"] < 1 and args.device.startswith("cuda") else "torch"})
    return rows


def table(rows: list[Row], columns: dict[str, str]) -> str:
    def cell(value: Any) -> str:
        return value if isinstance(value, str) else f"{value:,.2f}" if value % 1 and value < 100 else f"{value:,.0f}"

    lines = [list(columns), ["---"] * len(columns), *([cell(row[key]) for key in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    args = parse()
    on_card = args.device.startswith("cuda")
    if on_card and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: gpu_report.py measures a card (install a torch with CUDA, or --device cpu)")
    card = torch.cuda.get_device_name(args.device) if on_card else "a CPU, which these numbers say nothing about"
    parts = [f"# {card}", f"torch {torch.__version__}, CUDA {torch.version.cuda}; r = {args.r}, a step of "
             f"{args.batch_size} x {args.tokens} tokens, bfloat16, no gradient checkpointing"]  # fmt: skip
    methods = ["lora", *(name for name in args.methods if name != "lora"), "lora"]
    if "mora" in methods and find_spec("triton"):
        methods.insert(methods.index("mora") + 1, f"mora{FUSED}")
    for shape in args.shapes:
        base, kind = make_base(shape, args.device)
        vocabulary, layers = SHAPES[shape]["vocab_size"], SHAPES[shape]["num_hidden_layers"]
        ids = torch.randint(vocabulary, (args.batch_size, args.tokens), device=args.device)
        rows = []
        for method in methods:
            rows.append(measure(base, method, ids, args))
            gc.collect()  # the last method's tensors are no part of the next one's peak
        rows[-1]["arm"] = "lora, again"
        for row in rows:
            row["ratio"] = row["step_ms"] / rows[0]["step_ms"]
        parts += [f"## Training step, {shape} shape, {layers} layers, {kind} base",
                  table(rows, {"method": "arm", **COLUMNS, "parameters": "parameters"})]  # fmt: skip
        print(parts[-2], parts[-1], sep="\n", flush=True)
        del base
        gc.collect()
        what = "kernels" if on_card else "operations"
        columns = {"layer": "arm", what: "launches", f"µs in {what}": "device_us", "µs by the clock": "wall_us"}
        parts += [f"## One layer, {SHAPES[shape]['hidden_size']} x {SHAPES[shape]['hidden_size']}, bfloat16 base",
                  table(layer_rows(args, shape), columns)]  # fmt: skip
    for top_k in (args.r, max(1, args.r // 4)):
        parts += [f"## MORA's gate alone, K = {top_k} of {args.r}, forward and backward",
                  table(gate_rows(args, top_k), {"kernel": "kernel", "launches": "launches", "µs": "us"})]  # fmt: skip
    if find_spec("triton"):
        columns = {"K of R": "gate", "torch, µs in kernels": "torch_us", "torch, µs by the clock": "torch_wall",
                   "Triton, µs in kernels": "triton_us", "Triton, µs by the clock": "triton_wall",
                   "by torch's": "ratio", "wins": "wins"}  # fmt: skip
        parts += ["## MORA's gate by torch's operations and as Triton kernels", table(fused_rows(args), columns)]
    file = Path(args.output) / "report.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(*parts[-8:], f"{file} written", sep="\n\n")


if __name__ == "__main__":
    main()
