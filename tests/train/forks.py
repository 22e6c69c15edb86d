"""Runs `lora-core` in forked processes of one that has imported everything: real ones to kill.

Reads one JSON object a line: {"words": […], "env": {…}, "log": FILE} starts `lora-core words`,
stdout and stderr to FILE, and answers with the process's number; {"wait": number} answers with its
exit code, negative for a signal, once it has ended; {"poll": number}, with that or null.
"""

import json
import os
import sys

import torch

from lora_core.cli import finetune  # noqa: F401  # imported once, for all
from lora_core.cli.main import main
from lora_core.train import folder


def child(words: list[str], env: dict[str, str], log: str) -> None:
    """Be `lora-core`; never returns."""
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(env)
        code = main(words)
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001  # a fork may not run what the server has to do after
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def serve() -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(1)
    folder.plot_loss = lambda history, path: None
    ended: dict[int, int] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "words" in asked:
            sys.stdout.flush()
            answer: int | None = os.fork()
            if answer == 0:
                child(asked["words"], asked["env"], asked["log"])
        else:
            number, flags = asked.get("wait") or asked["poll"], 0 if "wait" in asked else os.WNOHANG
            if number not in ended:
                found, status = os.waitpid(number, flags)
                if found:
                    ended[number] = os.waitstatus_to_exitcode(status)
            answer = ended.get(number)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
