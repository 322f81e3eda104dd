"""`python -m peft_mora`: the command `peft-mora` under another name, for where no script is on the path.

`python -m peft_mora PROGRAM ...` runs a program with the tuners registered, without relying on autoload.
"""

from peft_mora_command import main


if __name__ == "__main__":
    main()
