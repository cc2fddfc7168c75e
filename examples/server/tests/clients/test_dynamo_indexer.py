"""Dynamo's own indexer hears the server, and is asked where prompts are. Skipped where its package is not installed:
target/clients-venv/bin/pip install ai-dynamo-runtime==1.6.1"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from conftest import eventually
from test_kv_events import BLOCK, catch_up, free_ports, prompts, serve, telling

pytest.importorskip("dynamo._core", reason="ai-dynamo-runtime is not installed")

# Salts that bear this mark are isolated from others in Dynamo's index; it does not see those without.
MARK = "dynamo-cache-salt:"

assert telling, "a fixture"


class Indexer:
    def __init__(self, directory):
        [port] = free_ports(1)
        self.root = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "dynamo.indexer", "--port", str(port), "--block-size", str(BLOCK)]
        environment = {**os.environ, "DYN_KV_INDEXER_TEST_ENDPOINTS": "1"}
        with (directory / "indexer.log").open("wb") as log:
            self.process = subprocess.Popen([*command, "--threads", "1"], stdout=log, stderr=log, env=environment)
        eventually(self.is_up, "the indexer does not start")

    def is_up(self):
        try:
            return urllib.request.urlopen(f"{self.root}/health", timeout=5).status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    def post(self, path, **body):
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.root + path, json.dumps(body).encode(), headers)
        return json.loads(urllib.request.urlopen(request, timeout=10).read())

    def blocks(self):
        dump = json.loads(urllib.request.urlopen(f"{self.root}/dump", timeout=10).read())
        events = [event["event"]["data"] for model in dump.values() for event in model["events"]]
        return sum(len(event["stored"]["blocks"]) for event in events)

    def longest(self, prompt, salt):
        """Tokens that it takes to be on the server; the last one of a prompt is computed in any case."""
        whole = (len(prompt) - 1) // BLOCK * BLOCK
        query = {"token_ids": prompt[:whole], "model_name": "m"}
        answer = self.post("/query", **query, **({"cache_salt": salt} if salt else {}))
        return answer["instances"].get("1", {}).get("longest_matched", 0)


@pytest.fixture
def indexer(tmp_path):
    started = Indexer(tmp_path)
    yield started
    started.process.terminate()
    started.process.wait(timeout=30)


@pytest.mark.parametrize("telling", [[], ["--kv-offloading-size", "0.05"]], indirect=True, ids=["alone", "host memory"])
def test_dynamos_indexer_knows_every_hit(telling, indexer):
    server, listener = telling
    addresses = (f"tcp://127.0.0.1:{port}" for port in listener.ports)
    about = dict(zip(["endpoint", "replay_endpoint"], addresses, strict=True))
    indexer.post("/register", instance_id=1, model_name="m", block_size=BLOCK, **about)
    eventually(lambda: server.metric("quayline:kv_events_subscribers") == 2, "the indexer has not subscribed")

    def serve_all(count, seed):
        """How many hits there were; the indexer knew each, once it has heard what the server told."""
        hits = 0
        for prompt, salt in prompts(count, seed):
            cached = indexer.longest(prompt, salt)
            assert serve(server, prompt, salt and MARK + salt) == cached, (prompt, salt)
            catch_up(server, listener)
            settle()
            hits += cached > 0
        return hits

    def settle():
        """Until the indexer has what our own index has, which has what the cache has."""
        blocks = sum(len(blocks) for blocks in listener.index.media.values())
        eventually(lambda: indexer.blocks() == blocks, lambda: f"{indexer.blocks()} blocks, not {blocks}")

    assert serve_all(30, seed=7) > 5
    # It loses some batches, sees the hole, and asks for them again.
    indexer.post("/test/pause_listener", instance_id=1, dp_rank=0)
    for prompt, salt in prompts(10, seed=8):
        serve(server, prompt, salt and MARK + salt)
    indexer.post("/test/resume_listener", instance_id=1, dp_rank=0)
    serve(server, [200] * 40, None)
    catch_up(server, listener)
    settle()
    assert server.metric("quayline:kv_events_replayed_batches_total") > 0
    assert serve_all(30, seed=9) > 5
