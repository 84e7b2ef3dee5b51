"""Commands in processes that are forked from one that has imported torch already: to import it takes as long as many a short training."""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess

PRELOAD = ["minmodels.forked", "minmodels.__main__", "minmodels.train", "torch._dynamo"]  # the last one: the first optimizer asks for it


def process(argv: list[str], threads: int, errors: str) -> BaseProcess:
    """`python -m minmodels ARGV`, not yet started, on so many threads, without input and output; its errors go to the file of that name."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    if threading.current_thread() is threading.main_thread():  # a Ctrl-C in the terminal must not end the server while it imports
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, before)
    return context.Process(target=run, args=(argv, threads, errors))


def run(argv: list[str], threads: int, errors: str):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    import torch

    from minmodels.__main__ import main

    nothing, said = os.open(os.devnull, os.O_RDWR), os.open(errors, os.O_WRONLY)
    for stream, to in enumerate((nothing, nothing, said)):
        os.dup2(to, stream)
    torch.set_num_threads(threads)
    sys.exit(main(argv))
