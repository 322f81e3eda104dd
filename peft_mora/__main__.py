"""`python -m peft_mora PROGRAM ...`: run a program with the tuners registered, without relying on autoload.

PROGRAM is a Python file, `-m MODULE`, or the name of an installed command such as `lm_eval` or `trl`.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.metadata import entry_points


USAGE = """usage: python -m peft_mora PROGRAM [ARGS ...]

Run PROGRAM with the adapter types of peft_mora known to PEFT. PROGRAM is a Python file, "-m MODULE", or the name of an
installed command:
  python -m peft_mora train.py --lr 1e-4
  python -m peft_mora -m trl.scripts.sft --help
  python -m peft_mora lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks arc_easy"""


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if arguments else 2)
    import peft_mora  # noqa: F401

    program, *rest = arguments
    if program == "-m":
        if not rest:
            raise SystemExit("python -m peft_mora -m needs the name of a module, e.g. -m trl.scripts.sft")
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif os.path.isfile(program):
        sys.argv = [program, *rest]
        if not getattr(sys.flags, "safe_path", False):  # Python 3.11's -P leaves the folder out
            sys.path[0] = os.path.dirname(os.path.abspath(program))  # as `python FILE` does
        runpy.run_path(program, run_name="__main__")
    else:
        commands = entry_points(group="console_scripts", name=program)
        if not commands:
            raise SystemExit(f"{program}: no such file, and no installed package has a command of that name.")
        sys.argv = [program, *rest]
        raise SystemExit(next(iter(commands)).load()())


if __name__ == "__main__":
    main()
