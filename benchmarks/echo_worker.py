"""A site's executor that stays and answers with benchmarks/plain_flower.py: no site, no gate, no ledger behind it.

    python benchmarks/echo_worker.py --site … --runtime … --secret … --bundle …   (as wardround.client.worker)

The peer of benchmarks/deployed_round.py: what is left when a secure sum's work is taken out of an exchange, and
everything that Flower and our resident worker do with a message stays in.
"""

from __future__ import annotations

import sys

from plain_flower import client
from wardround.client import worker


class Echo(worker.Worker):
    """Nothing of a message is kept or recorded."""

    def _keep(self, kept: worker.Kept) -> None: ...

    def _answered(self, message: worker.Message, context: worker.Context) -> worker.Message:
        return client(message, context)


if __name__ == "__main__":
    sys.exit(Echo(worker.parse(None)).run())
