#!/usr/bin/env python3
"""Writes what transformers makes of chat templates and of the bundled tokenizer, for tests/text.rs.

Usage: make_goldens.py DATA [REPOSITORY]. DATA is the folder with chat-templates/. Templates under a permissive
licence that stand in templates/ beside this script are rendered in full into rendered.json; of all templates
in DATA only a hash of the rendered text is written, into hashes.json. tokenizer.json has ids of hard strings.
"""
import hashlib
import html
import json
import pathlib
import re
import sys

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

HERE = pathlib.Path(__file__).parent
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Weather <now> & \"soon\" — für Städte",
    "parameters": {"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "description": "The city"},
        "days": {"type": "integer", "minimum": 1, "default": 3},
        "scale": {"type": "number", "default": 1.0, "enum": [0.5, 1e-05, 1e16]},
        "unit": {"type": ["string", "null"], "enum": ["celsius", None, True]}}}}}]
CALL = {"id": "abcdef123", "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": "Zürich \"1\"", "days": 2, "deep": {"a": [1.5, None]}}}}
CASES = {
    "one": {"messages": [{"role": "user", "content": "Hello, wörld!"}], "add_generation_prompt": True},
    "turns": {"messages": [
        {"role": "system", "content": "Be <brief> & \"kind\"."},
        {"role": "user", "content": "  What is 1+1?\n"},
        {"role": "assistant", "content": " 2 \U0001f600"},
        {"role": "user", "content": "And 2+2?"}], "add_generation_prompt": True},
    "closed": {"messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."}]},
    "tools": {"messages": [{"role": "user", "content": "Weather?"}], "tools": TOOLS, "add_generation_prompt": True},
    "called": {"messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "abcdef123", "content": "{\"temp\": 21.5}"}],
        "tools": TOOLS, "add_generation_prompt": True},
    "open": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure, "}],
             "continue_final_message": True},
    "rules": {"messages": [{"role": "assistant", "content": "I"}, {"role": "assistant", "content": "begin"}]},
}


def render(source, case):
    """The text, or None if the template refuses."""
    case = dict(case)
    messages = case.pop("messages")
    try:
        rendered, _ = render_jinja_template([messages], chat_template=source, **case, **SPECIAL)
    except Exception:
        return None
    text = re.sub(r"\d{4}-\d{2}-\d{2}|\d{2} [A-Z][a-z]{2} \d{4}", "DATE", rendered[0])
    # A template that marks one string as safe makes jinja2 escape what is added to it. Nobody wants that.
    return html.unescape(text) if "&#34;" in text else text


def on_the_wire(case):
    """The same case with arguments of tool calls as strings."""
    case = json.loads(json.dumps(case))
    for message in case["messages"]:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return case


def write(name, value):
    (HERE / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def main():
    data = pathlib.Path(sys.argv[1])
    write("cases.json", {name: on_the_wire(case) for name, case in CASES.items()})
    rendered = {}
    for path in sorted((HERE / "templates").glob("*.jinja")):
        rendered[path.name] = {name: render(path.read_text(), case) for name, case in CASES.items()}
    write("rendered.json", rendered)
    hashes = {}
    for path in sorted((data / "chat-templates").glob("*/*.jinja")):
        texts = {name: render(path.read_text(), case) for name, case in CASES.items()}
        digest = {name: text and hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        hashes[f"{path.parent.name}/{path.name}"] = digest
    write("hashes.json", hashes)
    bundled = HERE.parent.parent / "bundled"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(bundled / "tokenizer.json"))
    texts = ["", " ", "ROMEO:\n", "O, she doth teach the torches to burn bright!", "a\n\n\nb  c\t d",
             "naïve café — “quoted” … 你好 🌍🏽 \u200d", "\x00\x7f\u0085", "<|begin|>x<|end|> <|pad|>", "3.14159 1,000,000",
             "\r\nI'll've won't DON'T", "é́ ﬁ Å"]
    write("tokenizer.json", [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)} for text in texts])


main()
