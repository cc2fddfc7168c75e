#!/usr/bin/env bash
# Real clients against the built server: the openai and langchain-openai packages, ZeroMQ's own library and msgspec.
# Needs python3 with venv, a package index, and `cargo build --release -p quayline-server` before. Arguments go to pytest.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$(cd "$here/../../../.." && pwd)/target}
export QUAYLINE_SERVER=${QUAYLINE_SERVER:-$target/release/quayline-server}
if [[ ! -x $QUAYLINE_SERVER ]]; then
    echo "no server at $QUAYLINE_SERVER: run cargo build --release -p quayline-server" >&2
    exit 1
fi

venv=$target/clients-venv
if ! cmp -s "$here/requirements.txt" "$venv/requirements.txt"; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$venv/requirements.txt"
fi
cd "$here"
exec "$venv/bin/python" -m pytest -q -p no:cacheprovider "$@"
