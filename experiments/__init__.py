"""One command a module: `python -m experiments.NAME --help`."""

import importlib.util
import os
import signal
import sys

if sys.argv[:1] == ["-m"]:  # a command, whose own imports come next
    # What is not open would be the next file that is opened, and take what is printed.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    # While they run, Ctrl-C ends the process at once: modules in C would report it as errors of
    # their own, or not at all.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if importlib.util.find_spec("tyro") is None:
        sys.exit('error: the commands need more packages: pip install -e ".[experiments]"')
