"""The command ``seawall``: reads the command line, runs one command, and leaves with an exit code.

Exit codes: 0 done, 2 the user's input was wrong, 1 anything else, 130 interrupted with Ctrl-C, 143 ended with SIGTERM
(any signal that schedulers send before a job's end: 128 plus its number). With ``--json`` the standard output
holds one JSON document and nothing else; progress and messages go to the error stream. Heavy imports happen inside the
commands, so that ``seawall --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version

import experiments.commands
from experiments.agent_arguments import agent_settings, is_agent_setting
from framework.errors import ConfigError, SeawallError, StorageError
from framework.interruption import Interrupted, catching_signals

__all__ = ["build_parser", "command_names", "main"]

PROGRAM = "seawall"
INTERRUPTED = 130
SHARED = "output"  # what the commands share, no command itself
# The order of --help; a command is a module of experiments/commands, and one that is not named here comes after these.
ORDER = (
    "run",
    "compare",
    "ablate",
    "sweep",
    "report",
    "evaluate",
    "judge",
    "attack",
    "gate",
    "mine",
    "tokens",
    "neurons",
    "patch",
    "direction",
    "release",
    "verify",
    "methods",
    "contract",
    "new-method",
    "conformance",
    "doctor",
    "cache",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments without the program's name; None takes the process's.
    """
    try:
        arguments = _parse(argv)
    except SystemExit as stop:  # argparse's way to say --help, --version and wrong usage
        return stop.code if isinstance(stop.code, int) else 2
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with catching_signals(_answer_signal):
            return int(arguments.command(arguments))
    except (Interrupted, KeyboardInterrupt) as stop:
        return _report_stop(stop)
    except SeawallError as error:
        return _report(error, arguments.verbose) if _speaks_for(error) else error.exit_code
    except Exception as error:
        if not _speaks_for(error):
            return 1
        if arguments.verbose:
            traceback.print_exc()
        _complain(f"{type(error).__name__}: {error}")
        if not arguments.verbose:
            _complain("This is not your mistake. Run with --verbose for the traceback.", prefix="")
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; every command stores its function as ``command``."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Fine-tune a language model without losing its safety, and compare the methods that promise it.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version(PROGRAM)}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON on the standard output")
    common.add_argument("--verbose", action="store_true", help="show tracebacks")
    for name in command_names():
        module = importlib.import_module(f"{experiments.commands.__name__}.{name.replace('-', '_')}")
        added = commands.add_parser(name, parents=[common], help=module.SUMMARY, description=module.SUMMARY)
        added.set_defaults(command=module.command, overrides=[], takes_settings=False)
        module.add_arguments(added)
    return parser


def command_names() -> list[str]:
    """Return the names of the commands: the modules of the commands folder that have ``SUMMARY`` and two functions."""
    found = {module.name.replace("_", "-") for module in pkgutil.iter_modules(experiments.commands.__path__)} - {SHARED}
    return [name for name in ORDER if name in found] + sorted(found - set(ORDER))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; settings may stand before and after options, which argparse alone cannot do below a command."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    strange = [text for text in rest if text.startswith("-") and not is_agent_setting(text)]
    if strange or (rest and not arguments.takes_settings):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    arguments.overrides = agent_settings([*arguments.overrides, *rest])
    return arguments


def _speaks_for(error: BaseException) -> bool:
    """Return whether this process tells the user about the error; with several, one of them does."""
    processes = sys.modules.get("framework.processes")  # not loaded: there is one process
    return processes is None or bool(processes.speaks_for(error))


def _is_main() -> bool:
    processes = sys.modules.get("framework.processes")
    return processes is None or bool(processes.is_main())


def _answer_signal(text: str) -> None:
    """Say something from within a signal handler, where `print` may find itself interrupted."""
    if _is_main():
        os.write(sys.stderr.fileno(), f"{PROGRAM}: {text}\n".encode())


def _report_stop(stop: Interrupted | KeyboardInterrupt) -> int:
    text, code = "interrupted; finished stages are kept and will be reused", INTERRUPTED
    if isinstance(stop, Interrupted):
        text, code = str(stop), stop.exit_code
    if _is_main():
        _complain(text)
    return code


def _report(error: SeawallError, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    problems = error.problems if isinstance(error, ConfigError) else [_message(error)]
    if len(problems) > 1:
        _complain(f"{len(problems)} problems")
        for problem in problems:
            _complain(problem, prefix="  - ")
    else:
        _complain(problems[0])
    return error.exit_code


def _message(error: SeawallError) -> str:
    # OSError puts an errno and a tuple around the text when it is built with several arguments.
    return str(error.args[0]) if isinstance(error, StorageError) and error.args else str(error)


def _complain(text: str, *, prefix: str = f"{PROGRAM}: ") -> None:
    print(f"{prefix}{text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
