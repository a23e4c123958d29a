"""gpu.py with its stages, and their runs, forked from this process, whose imports each would do again: for test_gpu.py.

What a stage runs is the same script with the same arguments, environment and output.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import gpu
import peft  # noqa: F401
import torch
import transformers
import turns  # noqa: F401

from vblora_experiments import commands, schedule


class Forked:
    """What gpu.py and the campaigns use of a subprocess.Popen."""

    def __class_getitem__(cls, kind):
        return cls

    def __init__(self, command, stdout, stderr, env, cwd=".", start_new_session=False):
        self.returncode = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            # A fork renews the pool at its first use, which must not be by two threads at once.
            torch.set_num_threads(1)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            os.chdir(cwd)
            os.environ.update(env)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.argv = command[1:]
            sys.path[0] = str(Path(cwd, command[1]).parent)
            runpy.run_path(str(Path(cwd, command[1])), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self):
        found, status = os.waitpid(self.pid, os.WNOHANG)
        if found:
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert transformers.AutoModelForCausalLM and transformers.Trainer and transformers.LlamaForCausalLM
    gpu.Popen = Forked
    schedule.subprocess = types.SimpleNamespace(Popen=Forked, STDOUT=gpu.STDOUT)
    schedule.tied = list  # the command as it is: Forked starts no other program
    commands.run(gpu.main, "gpu")
