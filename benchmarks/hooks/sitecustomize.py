"""Clocks in the processes of a deployment, for benchmarks/deployed_round.py; Python imports this module first.

Put on PYTHONPATH by that benchmark alone, with WARDROUND_TIMES naming a folder; without it nothing happens. Every
process then writes a JSON line an event to WARDROUND_TIMES/PID.jsonl; all of one machine share a clock. So what is
measured is what the `wardround` commands run, not a copy of it:

    exchange   of the coordinator (server/app.py): route, round, began, seconds, codes, bytes each way
    task       of a site's worker: began (before a message is fetched), pulled (all is there), answered, route
    train      local training: began, first_step (None: there was none), ended
"""

from __future__ import annotations

import importlib.abc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_FOLDER = os.environ.get("WARDROUND_TIMES")


def _note(**event: Any) -> None:
    with (Path(str(_FOLDER)) / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def _exchanges(module: Any) -> None:
    before = module.FlowerExchange.ask

    def ask(self: Any, instructions: Any) -> Iterator[Any]:
        first, began, answers = next(iter(instructions.values()), None), time.time(), []
        for answer in before(self, instructions):
            answers.append((answer.code, answer.bytes_up, answer.bytes_down))
            yield answer
        if first is not None:
            _note(
                event="exchange",
                route=first.ROUTE,
                round=first.round_index,
                began=began,
                seconds=time.time() - began,  # with what the coordinator did with each reply
                codes=[code for code, _, _ in answers],
                bytes_up=sum(up for _, up, _ in answers),
                bytes_down=sum(down for _, _, down in answers),
            )

    module.FlowerExchange.ask = ask


_arrived = list[float]()


def _tasks(module: Any) -> None:
    before = module.RuntimeHttpClient.PullTaskInput

    def pull_task_input(self: Any, request: Any) -> Any:
        _arrived[:] = [time.time()]
        return before(self, request)

    module.RuntimeHttpClient.PullTaskInput = pull_task_input


def _work(module: Any) -> None:
    before = module.respond

    def respond(site_toml: Any, kind: Any, *given: Any) -> Any:
        began, pulled = _arrived[-1] if _arrived else None, time.time()
        reply = before(site_toml, kind, *given)
        _note(event="task", began=began, pulled=pulled, answered=time.time(), route=kind.ROUTE)
        return reply

    module.respond = respond


def _training(module: Any) -> None:
    train, step, first = module.train_local_round, module.Engine.training_step, list[float]()

    def training_step(self: Any, *arguments: Any, **named: Any) -> Any:
        first.append(time.time())
        return step(self, *arguments, **named)

    def train_local_round(*arguments: Any, **named: Any) -> Any:
        first.clear()
        began = time.time()
        result = train(*arguments, **named)
        _note(event="train", began=began, first_step=first[0] if first else None, ended=time.time())
        return result

    module.Engine.training_step, module.train_local_round = training_step, train_local_round


_AFTER: dict[str, Callable[[Any], None]] = {
    "wardround.server.app": _exchanges,
    "flwr.supercore.runtime": _tasks,
    "wardround.client.gate": _work,
    "wardround.client.grpo": _training,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds these modules as everybody does, and changes them once they are there."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in _AFTER:
            return None
        others = (one for one in sys.meta_path if one is not self)
        spec = next((found for one in others if (found := one.find_spec(fullname, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def then_change(module: Any) -> None:
            execute(module)
            _AFTER[fullname](module)

        spec.loader.exec_module = then_change  # type: ignore[method-assign]
        return spec


if _FOLDER:
    sys.meta_path.insert(0, _Finder())
