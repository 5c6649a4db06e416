"""What the commands share: flags of several processes, and mistakes answered by one line and exit code 1."""

import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Sequence
from logging import CRITICAL, getLogger
from typing import NoReturn

import jax
from absl import app, flags, logging

from gspn_jax.training import CheckpointError, NonFinite, Preempted
from gspn_jax.training.distributed import initialise

FLAGS = flags.FLAGS
INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended
TERMINATED = 143  # what a shell reports for a process that SIGTERM ended
# What a user can cause: wrong values, missing files, a full disk, a learning rate that is too high.
_MISTAKES = (ValueError, OSError, CheckpointError, NonFinite)
# What wrong flags raise, besides the errors for keys that do not exist.
_WRONG_FLAGS = (flags.Error, ValueError, TypeError, OSError)


def start(main: Callable[..., object], define_flags: Callable[[], object]) -> None:
    """Defines the flags, parses the command line, joins other processes, runs `main` and exits.

    Flags are defined here and not on import, so that any two commands can be imported into one process.

    Args:
        main: gets the arguments that are no flags.
        define_flags: defines those of this command.
    """
    flags.DEFINE_bool("traceback", False, "Show where an error came from, instead of one line.")
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0; needs the next two as well.")
    flags.DEFINE_integer("num_processes", None, "How many processes run this command together.")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
    define_flags()
    app.run(functools.partial(_guarded, main), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except (KeyError, AttributeError) as error:  # config_flags names the last part of the key only
        key = str(error.args[0] if error.args else error)
        guilty = [word for word in argv[1:] if any(part in key for part in word.split("=")[0].split(".")[1:])]
        fail(ValueError(f"no such key in the configuration: {' or '.join(guilty) or key}"))
    except _WRONG_FLAGS as error:
        if "Traceback" not in str(error):
            fail(error)
        fail(ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")))  # from a configuration file


def _guarded(main: Callable[..., object], argv: list[str]) -> None:
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax reports every file that it writes as information
    if not FLAGS.traceback:
        _quieten()
    try:
        initialise(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id)
        if inspect.signature(main).parameters:
            main(argv[1:])
        elif argv[1:]:
            raise ValueError(f"expected flags only, got {' '.join(argv[1:])}")
        else:
            main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(TERMINATED)
    except _MISTAKES as error:
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
    """The numbers of a flag; ValueError, which names it, for words that are none."""
    try:
        return tuple(int(word) for word in words)
    except ValueError as error:
        raise ValueError(f"{name}: expected integers, got {','.join(words)}") from error


def fail(error: BaseException) -> NoReturn:
    """Prints an error as one line and exits with code 1."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    sys.stdout.flush()
    if jax.distributed.is_initialized():  # the other processes want to hear that this one leaves
        sys.exit(1)
    os._exit(1)  # without the complaints of libraries that now cannot flush their files
