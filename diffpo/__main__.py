"""``diffpo <command>``, which is ``python -m diffpo.<command>``. Nothing that takes time is imported before the command is known."""

import difflib
import runpy
import sys

import diffpo
from diffpo.runs.faults import INTERRUPTED, output_may_fail, stopped

COMMANDS = {
    "train": ("diffpo.train", "reinforcement learning of a model, from a recipe or flags"),
    "evaluate": ("diffpo.evaluate", "accuracy, network evaluations and speed of a model on a task"),
    "generate": ("diffpo.generate", "complete prompts, from words, a file or standard input"),
    "pretrain": ("diffpo.pretrain", "make a tiny base model from scratch"),
    "report": ("diffpo.report", "one page of a training, or of several beside each other"),
    "kernels": ("diffpo_kernels", "which kernels were built, which are used, and why"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command, which ends the program with its own exit code; 2 for an unknown one, 130 for Ctrl-C while it is still imported."""
    with output_may_fail():
        try:
            _run(arguments)
        except KeyboardInterrupt:
            raise SystemExit(stopped("before the start: interrupted", INTERRUPTED)) from None


def _run(arguments: list[str] | None) -> None:
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if command in ("-h", "--help"):
        print(_help())
    elif command == "--version":
        print(f"diffpo {diffpo.__version__}")
    elif command in COMMANDS:
        sys.argv[1:] = rest
        runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=True)
    else:
        _refuse(command)


def _help() -> str:
    lines = (f"  {name:10}{about}" for name, (_, about) in COMMANDS.items())
    return "\n".join(["usage: diffpo COMMAND [--help] ...", "       diffpo --version", "", *lines])


def _refuse(command: str) -> None:
    if not command:
        message = f"no command: give one of {', '.join(COMMANDS)}"
    else:
        (near,) = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)
        message = f"unknown command {command!r}; nearest: {near}"
    print(f"error: {message}; see diffpo --help", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
