#!/usr/bin/env python3
"""Trains the bundled model: a small Llama that writes dialogue in the manner of Shakespeare.

    python train.py --out .. --evaluate     # the loss of the model as it stands
    python train.py --measure 20            # tokens per second of this machine, then stop
    README.md                               # the two commands that made the model

The text lies beside this script; nothing is fetched. The same seed, thread count and library versions give the
same weights. Needs torch, tokenizers, safetensors and numpy.

A play is a list of speeches. Each becomes `NAME:\\n<text><|end|>\\n\\n`, so that a chat is a scene and an answer ends by
itself. The last tenth of the text is never trained on.
"""

import argparse
import gzip
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

HERE = Path(__file__).resolve().parent
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"  # ids 0, 1, 2


@dataclass
class Shape:
    """The model's shape, in the words of config.json."""

    vocab_size: int = 1536
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


# ---------------------------------------------------------------- the text


def read_speeches():
    """The two splits, each a list of (speaker, words). The cut is the first speech after nine tenths of the text."""
    text = gzip.open(HERE / "tinyshakespeare.txt.gz", "rt", encoding="utf-8").read()
    cut = text.index("\n\n", len(text) * 9 // 10) + 2
    return speeches_of(text[:cut]), speeches_of(text[cut:])


def speeches_of(text):
    """A name with no words after it is what is left of a stage direction; it is not a speech."""
    parts = (part.partition(":\n") for part in text.strip().split("\n\n"))
    return [(name, words) for name, _, words in parts if words.strip()]


def render(speeches):
    return "".join(f"{name}:\n{words}{END}\n\n" for name, words in speeches)


def train_tokenizer(speeches, vocab_size):
    """Byte-level BPE: every string has an encoding, and decoding gives the string back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{name}:\n{words}\n\n" for name, words in speeches), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return tokenizer


class Text:
    """A split as one line of token ids, and the places where a speech starts."""

    def __init__(self, tokenizer, speeches):
        encoded = tokenizer.encode(render(speeches), add_special_tokens=False).ids
        self.begin = tokenizer.token_to_id(BEGIN)
        self.ids = np.array(encoded, dtype=np.int64)
        self.byte_count = len(render(speeches).replace(END, "").encode())
        end = tokenizer.token_to_id(END)
        newline = tokenizer.encode("\n", add_special_tokens=False).ids
        after_end = np.flatnonzero(self.ids == end) + 1 + 2 * len(newline)
        self.starts = np.concatenate([[0], after_end[:-1]])

    def windows(self, random, count, length):
        """Half start with <|begin|> at the start of a speech, as a chat does; half start anywhere."""
        rows = []
        for at_start in random.random(count) < 0.5:
            if at_start:
                start = random.choice(self.starts[self.starts < len(self.ids) - length])
                rows.append(np.concatenate([[self.begin], self.ids[start : start + length]]))
            else:
                start = random.integers(0, len(self.ids) - length)
                rows.append(self.ids[start : start + length + 1])
        rows = torch.from_numpy(np.stack(rows))
        return rows[:, :-1], rows[:, 1:]


# ---------------------------------------------------------------- the model, with the names of a Hugging Face Llama


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x, cos, sin):
    """Rotary embedding, halves layout: dimension i turns with dimension i + head_dim / 2. x: [batch, heads, tokens, head_dim]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, shape.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        batch, tokens, _ = x.shape
        split = lambda y, heads: y.view(batch, tokens, heads, self.head_dim).transpose(1, 2)
        q = rotate(split(self.q_proj(x), self.heads), cos, sin)
        k = rotate(split(self.k_proj(x), self.kv_heads), cos, sin)
        v = split(self.v_proj(x), self.kv_heads)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class Mlp(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape, dropout):
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape)
        self.dropout = dropout

    def forward(self, x, cos, sin):
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class Decoder(nn.Module):
    def __init__(self, shape, dropout):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)


class Llama(nn.Module):
    """Embedding and output share one matrix."""

    def __init__(self, shape, dropout=0.0):
        super().__init__()
        self.model = Decoder(shape, dropout)
        self.dropout = dropout
        frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.outer(torch.arange(shape.max_position_embeddings).float(), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.num_hidden_layers) if residual else 0.02)

    def forward(self, tokens):
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = F.dropout(self.model.embed_tokens(tokens), self.dropout, self.training)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


# ---------------------------------------------------------------- optimisation


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by a Newton-Schulz iteration (Jordan et al., 2024), for the matrices inside the layers.

    On this text it reaches a loss in about half of AdamW's steps. Matrices of one shape go through the iteration together.
    """

    def __init__(self, weights, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for weight in group["params"]:
                velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
                velocity.lerp_(weight.grad, 1 - group["momentum"])
                ahead = torch.lerp(weight.grad, velocity, group["momentum"])
                by_shape.setdefault(weight.shape, []).append((weight, ahead))
            for shape, pairs in by_shape.items():
                updates = orthogonal(torch.stack([ahead for _, ahead in pairs]))
                scale = 0.2 * math.sqrt(max(shape))  # the root mean square of an AdamW update
                for (weight, _), update in zip(pairs, updates):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrices):
    """Drives every singular value towards one. matrices: [count, rows, columns]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def rate(step, options):
    """Share of the learning rate: up over `warmup` steps, flat, then down to nothing over the last `cooldown` steps."""
    return min(1.0, (step + 1) / options.warmup, (options.steps - step) / options.cooldown)


@torch.no_grad()
def held_out_loss(model, text, length, stride, limit=None):
    """Nats per token over the split, each token scored once with at least `length - stride` tokens before it."""
    model.eval()
    ids = torch.from_numpy(np.concatenate([[text.begin], text.ids[:limit]]))
    total, scored = 0.0, 0
    for start in range(0, len(ids) - 1, stride):
        stop = min(start + length, len(ids) - 1)
        losses = F.cross_entropy(model(ids[None, start:stop])[0], ids[start + 1 : stop + 1], reduction="none")
        fresh = losses[scored - start :]
        total, scored = total + fresh.sum().item(), scored + len(fresh)
        if stop == len(ids) - 1:
            break
    model.train()
    return total / scored


def train(options, shape, tokenizer, train_text, held_out):
    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    model = Llama(shape, options.dropout)
    matrices = [w for n, w in model.named_parameters() if w.dim() == 2 and "embed" not in n]
    others = [w for n, w in model.named_parameters() if w.dim() != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=options.lr, weight_decay=options.weight_decay),
        torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    average = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    step, best, seconds = 0, math.inf, 0.0
    if options.resume:
        saved = torch.load(options.state, weights_only=False)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        average, step, best, seconds = saved["average"], saved["step"], saved["best"], saved["seconds"]
        random.bit_generator.state = saved["random"]
        torch.set_rng_state(saved["torch_random"])
    predict = torch.compile(model) if options.compile else model
    began = time.monotonic() - seconds
    while step < options.steps:
        # Short windows first, they are cheaper; long ones while the rate falls, so that every position is learnt.
        length = shape.max_position_embeddings if step >= options.steps - options.cooldown * 2 // 3 else options.window
        tokens, targets = train_text.windows(random, options.batch_tokens // length, length)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * rate(step, options)
        loss = F.cross_entropy(predict(tokens).flatten(0, 1), targets.flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        keep = min(options.average, step / (step + 10))
        for name, weight in model.named_parameters():
            average[name].lerp_(weight.detach(), 1 - keep)
        if step % 10 == 0:
            elapsed = time.monotonic() - began
            print(f"step {step}/{options.steps} loss {loss.item():.4f} {elapsed:.0f} s", flush=True)
        if options.measure and step == options.measure:
            elapsed = time.monotonic() - began
            raise SystemExit(f"{step * options.batch_tokens / elapsed:.0f} tokens/s")
        if step % options.check_every == 0 or step == options.steps:
            averaged = Llama(shape)
            averaged.load_state_dict(average)
            sample = held_out_loss(averaged, held_out, 512, 256, limit=16384)
            kept = sample < best
            print(f"step {step} held-out {sample:.4f} nats/token over its first 16k tokens{' *' if kept else ''}", flush=True)
            if kept:
                best = sample
                export(options.out, shape, tokenizer, average)
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "average": average,
                "step": step,
                "best": best,
                "seconds": time.monotonic() - began,
                "random": random.bit_generator.state,
                "torch_random": torch.get_rng_state(),
            }
            torch.save(state, f"{options.state}.part")
            os.replace(f"{options.state}.part", options.state)
        if step == options.until:
            break


# ---------------------------------------------------------------- the files


def export(out, shape, tokenizer, weights):
    """A Hugging Face directory: what transformers and our engine load."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    bfloat = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(bfloat, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    ids = {"bos_token_id": tokenizer.token_to_id(BEGIN), "eos_token_id": tokenizer.token_to_id(END)}
    ids["pad_token_id"] = tokenizer.token_to_id(PAD)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **vars(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **ids,
    }
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {**ids, "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    special = lambda text: {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(tokenizer.token_to_id(text)): special(text) for text in (BEGIN, END, PAD)},
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_position_embeddings,
        "chat_template": (HERE / "chat_template.jinja").read_text(),
    }
    write_json(out / "tokenizer_config.json", tokenizer_config)


def evaluate(out, shape, train_text, held_out):
    """The exported weights, rounded to bf16, over all of the held-out text and as much of the other."""
    model = Llama(shape)
    model.load_state_dict({name: weight.float() for name, weight in load_file(Path(out) / "model.safetensors").items()})
    length = shape.max_position_embeddings
    for name, text in (("held-out", held_out), ("training", train_text)):
        loss = held_out_loss(model, text, length, length // 2, limit=len(held_out.ids))
        bits = loss * len(text.ids) / text.byte_count / math.log(2)
        print(f"{name} text: {loss:.4f} nats per token, {bits:.4f} bits per byte", flush=True)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="trained", help="where the Hugging Face directory goes")
    parser.add_argument("--state", default="training.pt", help="checkpoint file to resume from")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, perhaps with other options")
    parser.add_argument("--evaluate", action="store_true", help="train nothing; state the loss of the directory")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--until", type=int, help="stop at this step, a multiple of --check-every, to go on with --resume")
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--cooldown", type=int, default=400)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--average", type=float, default=0.98, help="decay per step of the averaged weights that are kept")
    parser.add_argument("--check-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1564)
    parser.add_argument("--compile", action="store_true", help="let torch.compile fuse the small operations: twice as fast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", type=int, help="stop after this many steps and print tokens per second")
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = Shape(**{name: getattr(options, name) for name in vars(Shape())})

    train_speeches, held_out_speeches = read_speeches()
    tokenizer = train_tokenizer(train_speeches, shape.vocab_size)
    train_text, held_out = Text(tokenizer, train_speeches), Text(tokenizer, held_out_speeches)
    parameters = sum(weight.numel() for weight in Llama(shape).parameters())
    print(f"{parameters} parameters; {len(train_text.ids)} tokens of {train_text.byte_count} bytes to train on,", end=" ")
    print(f"{len(held_out.ids)} of {held_out.byte_count} held out", flush=True)
    if not options.evaluate:
        train(options, shape, tokenizer, train_text, held_out)
    evaluate(options.out, shape, train_text, held_out)


if __name__ == "__main__":
    main()
