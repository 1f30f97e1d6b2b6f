"""Hostile requests by the hundred thousand: no answer of `dyadlm serve` may be a failure of the server.

    python benchmarks/serve_fuzz.py --requests 100000

Needs the extra `serve`, and httpx. The tests send 800 of the same kind. Requests go through the application itself
(ASGI), without a socket, so that those that no client would send come through, too.
"""

import argparse
import asyncio
import collections
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import httpx

from common import ROOT
from hostile_requests import hostile

sys.path.insert(0, str(ROOT / "tests" / "serve"))


async def sent(app: object, requests: int, seed: int) -> dict[str, int]:
    """How often each status was answered. Raises `SystemExit` at the first failure."""
    chance, statuses = random.Random(seed), collections.Counter[str]()
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    began = time.monotonic()
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60) as client:
        for number in range(requests):
            asked = hostile(chance)
            try:
                answer = await client.request(asked.method, asked.path, content=asked.content, headers=asked.headers)
            except (httpx.InvalidURL, httpx.LocalProtocolError):
                statuses["not sent"] += 1
                continue
            statuses[str(answer.status_code)] += 1
            if answer.status_code >= 500 and answer.status_code != 503:
                raise SystemExit(f"request {number} failed with {answer.status_code}: {asked} {answer.text}")
            if number % 5000 == 4999:
                print(number + 1, dict(statuses), f"{time.monotonic() - began:.0f} s", flush=True)
    return dict(statuses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    import conftest  # of tests/serve: the same models
    from dyadlm.serve import Limits, ServedModel, create_app

    limits = Limits(sessions=200)
    talker = conftest.byte_tokenizer()
    talker.chat_template = conftest.DEFAULT_TEMPLATE
    own = conftest.trained()
    pairs = {"small": (own, conftest.byte_tokenizer()), "talker": (own, talker)}
    models = {name: ServedModel(name, *pair, limits) for name, pair in pairs.items()}
    with tempfile.TemporaryDirectory() as folder:
        app = create_app(models, Path(folder), limits, hosts=["127.0.0.1"])
        print(json.dumps(asyncio.run(sent(app, options.requests, options.seed))))
        outside = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".state"]
        if outside:
            raise SystemExit(f"There are other files than sessions: {outside}")


if __name__ == "__main__":
    main()
