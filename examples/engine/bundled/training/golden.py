#!/usr/bin/env python3
"""Writes ../golden.json: what transformers answers with the bundled model, computed in f32 from the bf16 weights.

    python golden.py        # needs torch, transformers and jinja2

Each case has a conversation, the prompt that the chat template makes of it, its token ids, the greedy answer, and the
scores of the first answered token. `margin` is the smallest lead that a greedy token had over the next best.
"""

import json
from pathlib import Path

import torch
import transformers

BUNDLED = Path(__file__).resolve().parent.parent
CONVERSATIONS = [
    [{"role": "user", "content": "Good morrow, cousin."}],
    [
        {"role": "system", "content": "A street in Verona."},
        {"role": "user", "content": "Good morrow, cousin.", "name": "BENVOLIO"},
        {"role": "assistant", "content": "Is the day so young?", "name": "ROMEO"},
        {"role": "user", "content": "But new struck nine.", "name": "BENVOLIO"},
    ],
    [{"role": "user", "content": "Speak — naïve œuvre, 日本 🌹!\n\nNow."}],
]


@torch.no_grad()
def case(model, tokenizer, messages):
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer.encode(prompt, add_special_tokens=False)
    greedy, margin, first = [], float("inf"), None
    while len(greedy) < 40 and (not greedy or greedy[-1] != tokenizer.eos_token_id):
        scores = model(torch.tensor([tokens + greedy])).logits[0, -1]
        best = scores.topk(8)
        first = first or [[token, round(score, 5)] for token, score in zip(best.indices.tolist(), best.values.tolist())]
        margin = min(margin, (best.values[0] - best.values[1]).item())
        greedy.append(best.indices[0].item())
    return {
        "messages": messages,
        "prompt": prompt,
        "tokens": tokens,
        "greedy": greedy,
        "text": tokenizer.decode(greedy, skip_special_tokens=True),
        "first_scores": first,
        "margin": round(margin, 5),
    }


def main():
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    cases = [json.dumps(case(model, tokenizer, messages), ensure_ascii=False) for messages in CONVERSATIONS]
    golden = f'{{"made_by": {json.dumps(made_by)}, "cases": [\n' + ",\n".join(cases) + "\n]}\n"  # a case per line
    (BUNDLED / "golden.json").write_text(golden)


if __name__ == "__main__":
    main()
