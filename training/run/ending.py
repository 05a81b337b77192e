"""
How a program ends: where its user can mend what is wrong, with a sentence on stderr and status 1; at a fault of its
own with a traceback. IFLAME_DEBUG=1 in the environment shows the traceback of the former too.
"""

import errno
import functools
import gc
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from iflame_cli.errors import CommandError

DEBUG_VARIABLE = "IFLAME_DEBUG"
# Set by torch's launcher: a file in a folder of this process, which lies in one of all its processes on this machine.
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
RANK_VARIABLE = "RANK"  # set by launchers of several processes
CONNECTION_LOST = re.compile(r"Connection (closed|reset) by peer")
# In this time a launcher ends the other processes of a run after one has failed.
SECONDS_UNTIL_ENDED = 10
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|Unable to allocate", re.IGNORECASE)
# What a loader process died of, in the message of the exception that tells it.
WORKER_FAILURE = re.compile(r"Caught \w+ in DataLoader worker.*\n(?:[\w.]+\.)?\w+: (.*)", re.DOTALL)


def ends_in_words(program: str) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """
    For the main function of a program: it returns 1 after an error of the user's, said in a sentence that begins with
    the program's name, and 130 after Ctrl-C; all else that is raised goes through.
    """

    def decorate(main: Callable[..., int | None]) -> Callable[..., int]:
        def status_of(*arguments: object) -> int:
            try:
                return main(*arguments) or 0
            except KeyboardInterrupt:
                say_once(f"{program}: stopped")
                return 130
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try to flush it
                return 1
            except Exception as error:
                sentence = in_words(error)
                if sentence is None or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
                    raise
                say_once(f"{program}: {sentence}")
                return 1

        @functools.wraps(main)
        def run(*arguments: object) -> int:
            status = status_of(*arguments)
            if RANK_VARIABLE in os.environ:
                # A model that DDP has wrapped keeps the group of processes, and the group its threads. One of them
                # that lets go of a tensor while Python itself ends aborts the process: they end now, with the last
                # holder.
                gc.collect()
            return status

        return run

    return decorate


def in_words(error: Exception) -> str | None:
    """What a user reads of an error, in one line; None if it is none that a user could mend."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(text)):
        return f"memory does not suffice, docs/troubleshooting.md says what helps: {text.partition(chr(10))[0]}"
    if isinstance(error, RuntimeError) and CONNECTION_LOST.search(text):
        if ERROR_FILE_VARIABLE in os.environ:
            time.sleep(SECONDS_UNTIL_ENDED)
        return "another process of the run has ended; it says why"
    if not isinstance(error, (CommandError, ValueError, OSError, ImportError, SafetensorError)):
        return None
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        return f"the disk is full: {text}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        named = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{named}: {error.strerror}"
    if found := WORKER_FAILURE.match(text):
        text = found[1]
    return " ".join(text.split()) or type(error).__name__


def say_once(sentence: str) -> None:
    """Say it on stderr, unless another process of the same launch has said the same on this machine."""
    if is_first_to_say(sentence):
        print(sentence, file=sys.stderr, flush=True)


def is_first_to_say(sentence: str) -> bool:
    """Whether no other process that torch's launcher has started with this one on this machine asked for the same."""
    if ERROR_FILE_VARIABLE not in os.environ:
        return True
    together = Path(os.environ[ERROR_FILE_VARIABLE]).parent.parent
    try:
        (together / f"said-{hashlib.sha256(sentence.encode()).hexdigest()[:16]}").open("x").close()
    except FileExistsError:
        return False
    except OSError:
        pass
    return True
