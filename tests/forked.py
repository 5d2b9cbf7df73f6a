"""A process that has imported what commands do, and forks a process for each that it is asked for.

    python forked.py DESCRIPTOR MODULE …

Importing the modules is most of what a short command takes, and so is done once. The descriptor is
of a socket: a message there is JSON, `[words, environment, new_session, kept]`, with the
descriptors of the command's standard output and error, of a pipe that is told its process's number
and how it ended, and of those that the command knows by the numbers in `kept`.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys

from tracing import trace_without_notes


def main() -> None:
    for module in sys.argv[2:]:
        with contextlib.suppress(ImportError):  # which is the command's to tell
            importlib.import_module(module)
    trace_without_notes()
    gc.freeze()  # what is imported stays, and is shared with the commands
    gc.set_threshold(50_000)
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        while True:
            message, descriptors, *_ = socket.recv_fds(asked, 2**20, 8)
            if not message:
                return
            if parent := os.fork():
                os.waitpid(parent, 0)
                for descriptor in descriptors:
                    os.close(descriptor)
            elif os.fork():  # nobody's child, for nobody to wait for
                os._exit(0)
            else:
                break
    words, environment, new_session, kept = json.loads(message)
    output, errors, told, *others = descriptors
    if child := os.fork():
        os.write(told, f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(told, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    os.close(told)
    for source, target in ((output, 1), (errors, 2), *zip(others, kept, strict=True)):
        if source != target:
            os.dup2(source, target)
            os.close(source)
    # Those that were opened with this process take what they write to for what it was.
    sys.stdout = open(1, "w", encoding=sys.stdout.encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding=sys.stderr.encoding, closefd=False)  # noqa: SIM115
    if new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = words
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as experiments/__init__.py does
    if words[0].endswith(".py"):
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
