"""What the commands share: flags, `--help`, several processes, and errors as one line with exit code 1."""

import difflib
import functools
import inspect
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from gspn_jax.training import Preempted
from gspn_jax.training.distributed import initialise

FLAGS = flags.FLAGS
INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended
TERMINATED = 143  # what a shell reports for a process that SIGTERM ended
# What a user or a machine can cause: wrong values, missing files, full disks, NaN, no memory left, a lost process.
_EXPECTED = (ValueError, OSError, MemoryError, RuntimeError)
_LONGEST = 600  # characters of an error's text; XLA appends tables of allocations

_OUT_OF_MEMORY = (
    "out of memory: try a smaller batch size; in training also --config.accumulate=2 (parts of a batch one by one) "
    "or --config.model.remat=True"
)
_LOST = "lost another process of this run{}: see its own messages, then start all processes again"


def start(main: Callable[..., object], define_flags: Callable[[], object], positional: str | None = None) -> None:
    """Defines the flags, parses the command line, joins other processes, runs `main` and exits.

    Flags are defined by this function, not on import, so that any two commands can be imported into one process.

    Args:
        main: called without arguments or, with `positional`, with the list of words that are not flags.
        define_flags: defines the flags of this command.
        positional: what these words are, for messages, such as "IMAGE"; None: the command takes flags only.
    """
    before = set(FLAGS)
    define_flags()
    own = sorted(set(FLAGS) - before)
    flags.DEFINE_bool("traceback", False, "Show where an error came from, instead of one line.")
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0; needs the next two as well.")
    flags.DEFINE_integer("num_processes", None, "How many processes run this command together.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    if {"--help", "-help", "-h", "-?"} & set(sys.argv[1:]):
        print(_help(main, own, sorted(set(FLAGS) - before - set(own)), positional))
        sys.exit(0)
    app.run(functools.partial(_guarded, main, positional), flags_parser=_parse)


def _help(main: Callable[..., object], own: list[str], shared: list[str], positional: str | None) -> str:
    """Returns the text of `--help`: what the command does, its own flags, then those that all commands share."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    command = f"python -m {spec.name}" if spec else sys.argv[0]
    lines = [inspect.getdoc(inspect.getmodule(main)) or "", ""]
    lines += [f"usage: {command} [FLAGS]" + (f" {positional}..." if positional else ""), "", "flags:"]
    for name in own:
        lines += _flag_lines(FLAGS[name])
        if isinstance(FLAGS[name].parser, ConfigFileFlagParser):
            lines += [f"  --{name}.KEY=VALUE", "      Changes one value of the configuration; the file lists the keys."]
    lines += ["", "flags of every command:"]
    for name in shared:
        lines += _flag_lines(FLAGS[name])
    return "\n".join(lines)


def _flag_lines(flag: flags.Flag[Any]) -> list[str]:
    value = f"[no]{flag.name}" if flag.boolean else f"{flag.name}=..."
    default = "" if flag.default in (None, "", False) else f" Default: {(flag.default_as_str or '').strip("'")}."
    return [f"  --{value}", flags.text_wrap(f"{flag.help}{default}", length=100, indent="      ")]


def _parse(argv: list[str]) -> list[str]:
    try:
        argv = _last_of_each_key(argv)
        for name in FLAGS:
            if isinstance(FLAGS[name].parser, ConfigFileFlagParser):
                _check_configuration(name, argv)
        return FLAGS(argv)
    except (flags.Error, ValueError, TypeError, OSError) as error:
        fail(error)


def _last_of_each_key(argv: list[str]) -> list[str]:
    """Returns the command line with the last of several `--config.key=value`: ml_collections would join tuples."""
    last = {_key(word): number for number, word in enumerate(argv)}
    for word in argv:
        if word.startswith("--") and "." in word and "=" not in word and argv.count(word) > 1:
            raise ValueError(f"{word}: given twice")
    return [word for number, word in enumerate(argv) if not _key(word) or last[_key(word)] == number]


def _key(word: str) -> str:
    found = re.match(r"--?(\w+\.[^=]*)=", word)
    return found[1] if found else ""


def _check_configuration(name: str, argv: Sequence[str]) -> None:
    """Raises ValueError if the file of a configuration flag cannot be read, or if a flag names a key it lacks."""
    given = [word.split("=", 1)[1] for word in argv if re.match(rf"--?{name}=", word)]
    given += [after for word, after in zip(argv, argv[1:], strict=False) if word in (f"--{name}", f"-{name}")]
    if not given:
        return
    file = given[-1].split(":")[0]
    if not file.endswith(".py") or not Path(file).is_file():
        raise ValueError(f"--{name}: expected a Python file such as configs/classifier.py:digits, got {given[-1]}")
    try:
        config = FLAGS[name].parser.parse(given[-1])
    except (ValueError, TypeError) as error:  # the message holds the whole traceback
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
    except Exception as error:  # whatever a file does when it runs
        raise ValueError(f"--{name}: cannot run {file}: {type(error).__name__}: {error}") from error
    for word in argv:
        found = re.match(rf"--?(?:no)?{name}\.([^=]+)", word)
        if found:
            _check_key(word, found[1], config)


def _check_key(word: str, key: str, config: Any) -> None:
    for part in key.split("."):
        if not isinstance(config, ConfigDict) or part not in config:
            near = difflib.get_close_matches(part, config, n=1) if isinstance(config, ConfigDict) else []
            advice = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"no such key in the configuration: {word}{advice}")
        config = config[part]


def _guarded(main: Callable[..., object], positional: str | None, argv: list[str]) -> None:
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax reports every file that it writes as information
    if not FLAGS.traceback:
        _quieten()
    try:
        if argv[1:] and not positional:
            raise ValueError(f"expected flags only, got {' '.join(argv[1:])}")
        if positional and not argv[1:]:
            raise ValueError(f"expected at least one {positional} after the flags, got none")
        initialise(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
        if positional:
            main(argv[1:])
        else:
            main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(TERMINATED)
    except _EXPECTED as error:
        if FLAGS.traceback:
            raise
        fail(error)


def _quieten() -> None:
    """Lets background threads fail without a word: what they met reaches the main thread as an exception.

    A full disk makes dozens of threads of orbax and tensorstore print a traceback each, which would bury the one line.
    """
    logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)
    getLogger("asyncio").setLevel(CRITICAL)
    threading.excepthook = lambda _: None
    sys.unraisablehook = lambda _: None  # tensorstore calling back into an event loop that has ended


def integers(name: str, words: Sequence[str]) -> tuple[int, ...]:
    """Returns the numbers of a flag; raises ValueError, which names the flag, if a word is not an integer."""
    try:
        return tuple(int(word) for word in words)
    except ValueError as error:
        raise ValueError(f"{name}: expected integers, got {','.join(words)}") from error


def one_line(error: BaseException) -> str:
    """Returns what to print for an error: its text or, for a lack of memory and a lost process, what to try first."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"{_OUT_OF_MEMORY} ({text or 'no memory left on the host'})"
    if isinstance(error, jax.errors.JaxRuntimeError) and re.search("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|Gloo", text):
        named = sorted(set(re.findall(r"task[:/ ]+(\d+)", text)))
        return f"{_LOST.format(' (number ' + ', '.join(named) + ')' if named else '')} ({text})"
    return text or type(error).__name__


def fail(error: BaseException) -> NoReturn:
    """Prints an error as one line and exits with code 1."""
    print("error: " + one_line(error), file=sys.stderr, flush=True)
    sys.stdout.flush()
    if jax.distributed.is_initialized():  # the other processes want to hear that this one leaves
        sys.exit(1)
    os._exit(1)  # without the complaints of libraries that now cannot flush their files
