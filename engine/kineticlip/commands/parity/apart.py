"""Work in processes of its own: ranks that meet each other, and libraries that keep state."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from kineticlip.runtime.errors import UserError
from kineticlip.runtime.launch import child_environment

T = TypeVar("T")


def run_apart(
    function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], what: str
) -> list[T]:
    """function(*row) for every row of arguments, all at once, each in a fresh process.

    Results come in the order of the rows; they and the arguments are pickled. UserError naming
    `what` where a process ends without a result; its own words are on stderr.
    """
    # One server imports torch and the engine, 4 s of a core, and forks before any thread exists.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    os.environ.update(child_environment())  # the server has no other environment than this
    started = []
    try:
        for row in arguments:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_call, args=(sender, function, row), daemon=True)
            process.start()
            sender.close()  # so that the end of the process ends the pipe
            started.append((process, receiver))
        results = []
        for number, (process, receiver) in enumerate(started):
            try:
                results.append(receiver.recv())
            except EOFError:
                raise UserError(
                    f"{what}: process {number} of {len(started)} ended without a result"
                ) from None
            process.join()
        return results
    finally:
        for process, receiver in started:
            process.kill()
            process.join()
            receiver.close()


def _call(sender: Connection, function: Callable[..., Any], row: tuple[Any, ...]) -> None:
    sender.send(function(*row))
    sender.close()
