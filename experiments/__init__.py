"""One command a module: `python -m experiments.NAME --help`."""

import signal
import sys

# Of a command, while its imports run, Ctrl-C ends the process at once: modules in C would report
# it as errors of their own, or not at all.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
