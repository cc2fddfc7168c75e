"""What vLLM puts on the wire for some batches of events: writes golden.txt, a name and the bytes in hex on each line.

Fields, their order and their defaults are those of vllm/distributed/kv_events.py (0.33). Needs msgspec (0.22.0 wrote
the file that is here): python3 golden.py > golden.txt
"""

from typing import Any

import msgspec


class Batch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class Event(msgspec.Struct, omit_defaults=True, tag=True):
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
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    lookahead_token_ids: list[list[int]] | None = None


class BlockRemoved(Event):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(Event):
    pass


def name(first):
    """A digest of sixteen bytes that count up."""
    return bytes(first + index for index in range(16))


def low64(first):
    return int.from_bytes(name(first), "big") & ((1 << 64) - 1)


def stored(blocks, parent, tokens, size, medium="GPU", **more):
    fields = {"lora_id": None, "lora_name": None, "extra_keys": [None] * len(blocks), "group_idx": 0, **more}
    return BlockStored(blocks, parent, tokens, size, medium=medium, **fields)


def removed(block, medium="GPU", group=0):
    return BlockRemoved([block], medium, group)


def everything(naming):
    """Images across blocks (vLLM's test_mm_prefix_caching), an adapter, a salt, embeddings, a group, a parent."""
    media = [
        ("sql", ("aaa", 11), "salt1"),
        ("sql", ("aaa", -5), ("bbb", 14)),
        ("sql", ("bbb", -2)),
        ("sql", ("ccc", 0)),
    ]
    names = [naming(first) for first in (16, 32, 48, 64)]
    yield stored(names, None, list(range(64)), 16, lora_name="sql", extra_keys=media, group_idx=3)
    digests = [(bytes([1] * 32),), (bytes([2] * 32),)]
    yield stored(names[:2], naming(240), [1, 24, 127, 128, 255, 256, 70000, 4294967295], 4, extra_keys=digests)


BATCHES = {
    "plain": Batch(1.5, [stored([low64(0), low64(240)], None, [1, 2, 3, 4, 5, 6, 7, 8], 4)], 0),
    "without a rank": Batch(1700000000.25, [removed(low64(16))]),
    "a rank of two bytes": Batch(0.0, [removed(low64(16), group=200)], 300),
    "numbers": Batch(1.5, list(everything(low64)), 0),
    "bytes": Batch(1.5, list(everything(name)), 0),
    "lookahead": Batch(
        1.5, [stored([low64(0), low64(16)], None, [1, 2, 3, 4], 2, lookahead_token_ids=[[3, 4], [900, 901]])], 0
    ),
    "tiers": Batch(
        1.5,
        [
            stored([low64(0)], low64(16), [1, 2, 3, 4], 4, medium="CPU"),
            stored([low64(0)], None, [], 0, medium="STORAGE", extra_keys=None),
            removed(low64(0), "CPU"),
            removed(low64(0), "STORAGE"),
        ],
        0,
    ),
    "seventeen events and a long name": Batch(
        1.5, [stored([low64(0)], None, [7], 1, lora_name="l" * 40, extra_keys=[("l" * 40,)])] + [removed(low64(0))] * 16, 0
    ),
    "anew": Batch(
        1.5,
        [
            AllBlocksCleared(),
            stored([low64(0)], None, [1, 2], 2),
            stored([low64(16)], low64(0), [3, 4], 2),
        ],
        0,
    ),
}

for title, batch in BATCHES.items():
    print(f"{title}: {msgspec.msgpack.encode(batch).hex()}")
