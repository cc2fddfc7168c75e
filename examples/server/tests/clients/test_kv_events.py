"""A router's index, built from nothing but the events of the cache as vLLM's clients read them: ZeroMQ's own library and
msgspec. Fields are those of vllm/distributed/kv_events.py (0.33)."""

import hashlib
import pickle
import random
import socket
from typing import Any

import msgspec
import pytest
import zmq
from conftest import Server, eventually

BLOCK = 16
END = (-1).to_bytes(8, "big", signed=True)


class Event(msgspec.Struct, omit_defaults=True, tag=True, forbid_unknown_fields=True):
    pass


class BlockStored(Event):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None


class BlockRemoved(Event):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(Event):
    pass


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Index:
    """By medium and the hash of the parent, the blocks that go on from it."""

    def __init__(self):
        self.decoder = msgspec.msgpack.Decoder(Batch)
        self.media = {}
        self.next = 0
        self.kinds = set()

    def blocks(self, medium):
        return self.media.setdefault(medium, {})

    def apply(self, number, payload):
        assert number == self.next
        self.next += 1
        batch = self.decoder.decode(payload)
        assert batch.data_parallel_rank == 0
        for event in batch.events:
            self.kinds.add(type(event).__name__)
            match event:
                case AllBlocksCleared():
                    self.media.clear()
                case BlockRemoved(medium=medium):
                    for block in event.block_hashes:
                        del self.blocks(medium)[block]
                case BlockStored(medium=medium):
                    self.store(event, self.blocks(medium))

    def store(self, event, blocks):
        assert event.block_size == BLOCK and len(event.token_ids) == BLOCK * len(event.block_hashes)
        assert len(event.extra_keys) == len(event.block_hashes)
        parent = event.parent_block_hash
        for at, block in enumerate(event.block_hashes):
            assert block not in blocks, "stored twice"
            tokens = tuple(event.token_ids[at * BLOCK : (at + 1) * BLOCK])
            blocks[block] = (parent, tokens, event.extra_keys[at])
            parent = block

    def longest(self, prompt, medium, salt=None):
        """How many tokens of a prompt lie there; the last one is computed in any case."""
        children = {about: block for block, about in self.blocks(medium).items()}
        parent, found = None, 0
        for first in range(0, len(prompt) - BLOCK, BLOCK):
            extra = (salt,) if salt and first == 0 else None
            parent = children.get((parent, tuple(prompt[first : first + BLOCK]), extra))
            if parent is None:
                break
            found += BLOCK
        return found


class Listener:
    """Applies what it hears, and asks again for what it missed."""

    def __init__(self, port, replay_port, topic=b""):
        self.ports = (port, replay_port)
        self.context = zmq.Context()
        self.subscriber = self.context.socket(zmq.SUB)
        self.subscriber.connect(f"tcp://127.0.0.1:{port}")
        self.subscriber.subscribe(topic)
        self.replay = self.context.socket(zmq.DEALER)
        self.replay.connect(f"tcp://127.0.0.1:{replay_port}")
        self.index = Index()
        self.topic = topic
        self.replayed = 0

    def close(self):
        self.context.destroy(linger=0)

    def hear(self, loses=lambda: False):
        """Everything that has come. `loses` says whether to lose a batch, as a full queue would."""
        while self.subscriber.poll(0):
            topic, number, payload = self.subscriber.recv_multipart()
            number = int.from_bytes(number, "big")
            assert topic == self.topic
            if loses():
                continue
            if number > self.index.next:
                self.replayed += self.ask(self.index, upto=number)
            if number == self.index.next:
                self.index.apply(number, payload)

    def ask(self, index, upto=1 << 64):
        """Has an index told what it missed before `upto`. How many batches that were."""
        self.replay.send_multipart([b"", index.next.to_bytes(8, "big")])
        first = index.next
        while True:
            assert self.replay.poll(10_000), "no replay came"
            empty, topic, number, payload = self.replay.recv_multipart()
            assert empty == b""
            if number == END:
                assert (topic, payload) == (b"", b"")
                return index.next - first
            number = int.from_bytes(number, "big")
            if number < upto:
                index.apply(number, payload)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("0.0.0.0", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def telling(tmp_path, request):
    """A server of 40 blocks that tells, and a listener that it knows of."""
    port, replay_port = free_ports(2)
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{port}",
        "replay_endpoint": f"tcp://*:{replay_port}",
        "topic": "kv@here@model",
    }
    flags = ["--enable-prompt-tokens-details", "--num-gpu-blocks-override", "40", *getattr(request, "param", [])]
    server = Server(tmp_path, "--kv-events-config", msgspec.json.encode(config).decode(), *flags)
    listener = Listener(port, replay_port, b"kv@here@model")
    eventually(lambda: server.metric("quayline:kv_events_subscribers") == 1, "nobody subscribed")
    yield server, listener
    listener.close()
    assert server.stop() == 0


def prompts(count, seed):
    """Prompts that go on from others' beginnings, some of them under a salt."""
    rng = random.Random(seed)
    texts = [[rng.randrange(256) for _ in range(rng.randrange(40, 200))] for _ in range(6)]
    for _ in range(count):
        text = rng.choice(texts)
        own = [rng.randrange(256) for _ in range(rng.randrange(1, 40))]
        yield text[: rng.randrange(1, len(text))] + own, rng.choice([None, None, "tenant"])


def serve(server, prompt, salt):
    """How many tokens of the prompt were cached."""
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    answer = server.post("/v1/completions", {**body, "cache_salt": salt} if salt else body)
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def state(server):
    return msgspec.json.decode(server.text("/debug/state"))


def catch_up(server, listener, loses=lambda: False):
    """Until the index has as many blocks as the cache. Blocks that a request holds are not counted as cached."""
    eventually(server.is_idle, "a request is still there")

    def caught_up():
        listener.hear(loses)
        return len(listener.index.blocks("GPU")) == state(server)["blocks"]["cached"]

    eventually(caught_up, lambda: f"{len(listener.index.blocks('GPU'))} blocks, not {state(server)['blocks']['cached']}")


def test_an_index_made_of_events_knows_every_hit(telling):
    server, listener = telling
    hits = 0
    for prompt, salt in prompts(60, seed=1):
        expected = listener.index.longest(prompt, "GPU", salt)
        assert serve(server, prompt, salt) == expected, (prompt, salt)
        hits += expected > 0
        catch_up(server, listener)
    assert hits > 20 and listener.index.kinds == {"BlockStored", "BlockRemoved"}
    assert server.metric("quayline:kv_events_batches_total") == listener.index.next


def test_what_was_missed_is_replayed(telling):
    server, listener = telling
    rng = random.Random(2)
    for prompt, salt in prompts(30, seed=3):
        serve(server, prompt, salt)
        eventually(server.is_idle, "a request is still there")
        listener.hear(loses=lambda: rng.random() < 0.5)
    listener.ask(listener.index)
    late = Index()
    assert listener.ask(late) > 20 and listener.replayed > 5
    assert listener.index.media == late.media
    catch_up(server, listener)
    assert server.metric("quayline:kv_events_replayed_batches_total") >= listener.replayed + late.next


@pytest.mark.parametrize("telling", [["--kv-offloading-size", "0.05"]], indirect=True)
def test_host_memory_has_a_medium_of_its_own(telling):
    server, listener = telling
    loaded = 0
    for prompt, salt in prompts(40, seed=4):
        here, behind = (listener.index.longest(prompt, medium, salt) for medium in ("GPU", "CPU"))
        assert serve(server, prompt, salt) == max(here, behind), (prompt, salt)
        loaded += behind > here
        catch_up(server, listener)
        assert len(listener.index.blocks("CPU")) == state(server)["host"]["used"]
    assert loaded > 5


@pytest.mark.parametrize("telling", [["--server-dev-mode", "1"]], indirect=True)
def test_a_reset_clears_the_index(telling):
    server, listener = telling
    first, second = (list(range(begin, begin + 100)) for begin in (0, 100))
    assert serve(server, first, None) == 0
    catch_up(server, listener)
    assert listener.index.longest(first, "GPU") == 96
    server.text("/reset_prefix_cache", {})
    catch_up(server, listener)
    assert "AllBlocksCleared" in listener.index.kinds and not listener.index.blocks("GPU")
    assert serve(server, second, None) == 0
    catch_up(server, listener)
    assert listener.index.longest(second, "GPU") == 96 == serve(server, second, None)


@pytest.mark.parametrize("telling", [["--prefix-caching-hash-algo", "sha256"]], indirect=True)
def test_blocks_have_the_names_that_vllm_gives_them(telling):
    """`sha256_cbor` and the others differ in the encoding; their names are tested in the library."""
    server, listener = telling

    def name(parent, tokens, extra):
        return hashlib.sha256(pickle.dumps((parent, tokens, extra), protocol=5)).digest()

    first = hashlib.sha256(pickle.dumps("vllm-none-hash", protocol=5)).digest()
    for prompt, salt in prompts(30, seed=5):
        serve(server, prompt, salt)
    catch_up(server, listener)
    blocks = listener.index.blocks("GPU")
    assert len(blocks) > 20
    # Events name blocks by the last 64 bits.
    whole = {None: first}

    def check(parent):
        for block, (about, tokens, extra) in blocks.items():
            if about == parent:
                extra = (("cache_salt", *extra),) if extra else None
                whole[block] = name(whole[parent], tokens, extra)
                assert block == int.from_bytes(whole[block][-8:], "big")
                check(block)

    check(None)
    assert len(whole) > 20
