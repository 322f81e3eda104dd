"""Who imports whom: arrows point down only. `python tests/test_house.py` prints them."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from peft_mora import METHODS


HOUSE = f"""
    peft_mora: checks files fingerprint json_lines linalg inputs registry model_card packed kernels
    peft_mora: routing task_scores task_features row_tasks
    peft_mora: lean sampling
    peft_mora: quantization bases
    peft_mora: base
    peft_mora: seeded routed experts lora_file
    peft_mora: balance usage task_driver
    peft_mora: {" ".join(method.config.__module__.split(".")[1] for method in METHODS.values())}
    peft_mora: sparsity pruning export merging task_router info opening
    peft_mora: __init__
    trl_callbacks: metrics logs host usage_report
    trl_callbacks: factors subspace task_column
    trl_callbacks: constraint sources
    trl_callbacks: general_text
    trl_callbacks: drift
    trl_callbacks: projection prompts surgery penalties growth budget calibration input_statistics
    trl_callbacks: __init__
    peft_mora_command: __init__
    peft_mora: __main__
"""  # a floor sees those above it in this list; a folder is one room, and so is a module beside the packages
FLOORS = [line.split() for line in HOUSE.strip().splitlines()]
FLOOR = {f"{package[:-1]}.{room}": i for i, (package, *rooms) in enumerate(FLOORS) for room in rooms}
ROOT = Path(__file__).parent.parent
PATHS = {path for package in ("peft_mora", "trl_callbacks") for path in (ROOT / package).rglob("*.py")}
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text("utf-8") for path in PATHS}
MODULES["peft_mora_command.__init__"] = (ROOT / "peft_mora_command.py").read_text("utf-8")


def imports(module: str) -> set[str]:
    """Modules of ours that this one names, in functions as well; `from x import y` is y where y is a module."""
    found = []
    for node in ast.walk(ast.parse(MODULES[module])):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*here, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            found += [n if {n, f"{n}.__init__"} & MODULES.keys() else source for n in names]
    return {name if name in MODULES else f"{name}.__init__" for name in found} & MODULES.keys()


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_arrows_point_down_and_make_no_circle():
    arrows = {module: imports(module) for module in MODULES}
    between = [(a, b) for a in arrows for b in arrows[a] if room(a) != room(b)]
    assert not [f"{a} imports {b}" for a, b in between if FLOOR[room(b)] >= FLOOR[room(a)]]
    seen = {room(b) for a, b in between if room(a) == "peft_mora.merging" and FLOOR[room(b)]}
    # files, a 4-bit base that is looked at, and what is written over it
    assert seen == {"peft_mora.lora_file", "peft_mora.quantization", "peft_mora.sampling"}
    TopologicalSorter(arrows).prepare()  # also inside of a room


if __name__ == "__main__":
    for module in sorted(MODULES, key=lambda module: (FLOOR[room(module)], module)):
        print(f"{FLOOR[room(module)]:2} {module} -> {', '.join(sorted(imports(module)))}")
