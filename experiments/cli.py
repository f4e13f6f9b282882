"""The command ``seawall``: reads the command line, runs one command, and leaves with an exit code.

Exit codes: 0 done, 2 the user's input was wrong, 1 anything else, 130 interrupted. With ``--json`` the standard output
holds one JSON document and nothing else; progress and messages go to the error stream. Heavy imports happen inside the
commands, so that ``seawall --help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from rich.console import Console

from framework.errors import ConfigError, SeawallError, StorageError

__all__ = ["build_parser", "main"]

PROGRAM = "seawall"
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments without the program's name; None takes the process's.
    """
    try:
        arguments = _parse(argv)
    except SystemExit as stop:  # argparse's way to say --help, --version and wrong usage
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        _complain("interrupted; finished stages are kept and will be reused")
        return INTERRUPTED
    except SeawallError as error:
        return _report(error, arguments.verbose)
    except Exception as error:
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

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[common], help=text, description=text)
        added.set_defaults(command=command, overrides=[])
        return added

    overrides = {"nargs": "*", "metavar": "key=value", "help": "settings, e.g. seed=1 model=NAME stages.align=null"}
    run = add("run", _run, "run the stages of a recipe and measure the model")
    run.add_argument("recipe", metavar="RECIPE", help="a YAML file or the name of a recipe, e.g. quickstart")
    run.add_argument("overrides", **overrides)  # type: ignore[arg-type]
    evaluate = add("evaluate", _evaluate, "measure a model")
    evaluate.add_argument("model", metavar="MODEL", help="a folder, a GGUF file, a hub id or a known name")
    evaluate.add_argument("overrides", **overrides)  # type: ignore[arg-type]
    compare = add("compare", _compare, "run the grid of a study, one run after another, and compare")
    compare.add_argument("study", metavar="STUDY", help="a YAML file or the name of a study, e.g. quickstart")
    compare.add_argument("overrides", **overrides)  # type: ignore[arg-type]
    add("methods", _methods, "list the methods")
    add("doctor", _doctor, "check the environment, cache, model, disk and devices")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; settings may stand before and after options, which argparse alone cannot do below a command."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    strange = [text for text in rest if text.startswith("-") or not hasattr(arguments, "overrides")]
    takes_settings = any(hasattr(arguments, name) for name in ("recipe", "model", "study"))
    if strange or (rest and not takes_settings):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    from experiments.run import run_recipe
    from framework.config import load_run_config
    from framework.registry import validate_methods

    config = load_run_config(
        arguments.recipe, arguments.overrides, known=known_names(), validate_methods=validate_methods
    )
    return _show(arguments, lambda console: run_recipe(config, console=console))


def _evaluate(arguments: argparse.Namespace) -> int:
    from experiments.evaluate import evaluate_command
    from framework.config import load_evaluate_config

    config = load_evaluate_config(arguments.model, arguments.overrides, known=known_names())
    return _show(arguments, lambda console: evaluate_command(arguments.model, config, console=console))


def _compare(arguments: argparse.Namespace) -> int:
    from experiments.compare import compare_study
    from framework.registry import validate_methods
    from framework.study import load_study_config, study_cells

    study = load_study_config(arguments.study, arguments.overrides)
    study_cells(study, known=known_names(), validate_methods=validate_methods)
    return _show(arguments, lambda console: compare_study(study, console=console))


def _methods(arguments: argparse.Namespace) -> int:
    from experiments.console import methods_table
    from framework.registry import known_methods

    methods = known_methods()
    if arguments.json:
        _print_json(
            [
                {"name": m.name, "summary": m.summary, "points": list(m.points), "supports": list(m.supports)}
                for m in methods.values()
            ]
        )
    else:
        Console().print(methods_table(methods))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from experiments.console import doctor_table
    from experiments.doctor import diagnose

    with _clean_stdout(arguments.json):
        checks = list(diagnose())
    if arguments.json:
        _print_json([{key: getattr(c, key) for key in ("name", "status", "detail", "remedy")} for c in checks])
    else:
        Console().print(doctor_table(checks))
    return 1 if any(check.status == "fail" for check in checks) else 0


def known_names() -> Any:
    """Return the registered names a configuration may use, to refuse a misspelt one before any model loads."""
    from datamodules.catalog import known_prompt_sets
    from datamodules.tasks import known_tasks
    from framework.config import KnownNames
    from framework.default_model import DEFAULT_MODEL
    from framework.evaluation.judges import known_judges

    return KnownNames(
        tasks=frozenset(known_tasks()),
        judges=frozenset(known_judges()),
        models=frozenset([DEFAULT_MODEL]),
        safety_sets=frozenset(known_prompt_sets("safety")),
        over_refusal_sets=frozenset(known_prompt_sets("over_refusal")),
    )


def _show(arguments: argparse.Namespace, work: Callable[[Console], dict[str, Any]]) -> int:
    """Do the work and print its result as tables or as JSON."""
    from experiments.console import print_results

    with _clean_stdout(arguments.json):
        results = work(Console(stderr=arguments.json))
    if arguments.json:
        _print_json(results)
    else:
        print_results(results, Console())
    return 1 if any(run["status"] != "finished" for run in results.get("runs", [])) else 0


@contextlib.contextmanager
def _clean_stdout(is_json: bool) -> Iterator[None]:
    """Send what libraries print to the error stream, so that the standard output stays one JSON document."""
    if not is_json:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _print_json(value: Any) -> None:
    from framework.files import to_plain

    print(json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


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
