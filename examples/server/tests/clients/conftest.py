"""A server for the tests: the release binary with the model that is part of it, on a free loopback port."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import openai
import pytest

KEY = "a-key-for-tests"


class Server:
    """One running server. Its log goes to a file that is shown when it does not start."""

    def __init__(self, directory, *flags, **environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"
        self.log = directory / "server.log"
        command = [os.environ["QUAYLINE_SERVER"], "--port", str(port), "--api-key", KEY, *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)
        eventually(self.is_ready, lambda: f"the server is not ready:\n{self.log.read_text()}")
        self.model = self.get("/v1/models")["data"][0]

    def is_ready(self):
        assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
        try:
            return urllib.request.urlopen(f"{self.root}/readyz", timeout=5).status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    def get(self, path):
        return json.loads(self.text(path))

    def text(self, path, body=None):
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, headers)
        return urllib.request.urlopen(request, timeout=30).read().decode()

    def post(self, path, body):
        return json.loads(self.text(path, {"model": self.model["id"], **body}))

    def metric(self, name):
        """The sum of a metric over its labels."""
        lines = [line for line in self.text("/metrics").splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        assert lines, f"no metric {name}"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def is_idle(self):
        """Nothing runs, nothing waits, no request holds a block."""
        names = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
        return all(self.metric(name) == 0 for name in names)

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def stop(self):
        """Asks it to end, and gives its exit status."""
        if self.process.poll() is None:
            self.terminate()
        try:
            return self.process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def eventually(condition, complaint, seconds=30):
    """Asks until the answer is yes. What another process does has no other signal."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(complaint() if callable(complaint) else complaint)
        time.sleep(0.02)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("server"), "--enable-prompt-tokens-details")
    yield started
    assert started.stop() == 0


@pytest.fixture
def model(server):
    return server.model["id"]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def say(client, model):
    """One chat turn; greedy unless told otherwise."""

    def say(words="What light through yonder window breaks?", **options):
        messages = [{"role": "user", "content": words}]
        options = {"temperature": 0, "max_tokens": 40, **options}
        return client.chat.completions.create(model=model, messages=messages, **options)

    return say


@pytest.fixture(autouse=True)
def leaves_nothing_behind(server):
    yield
    eventually(server.is_idle, "a request is still there after its test")
