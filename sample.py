"""Generate text with a trained model: a run (its newest step), a checkpoint's step folder, or any Llama folder.

    python sample.py runs/demo --prompt "def " --tokens 200
    python sample.py runs/demo --prompt "import " --prompt "class " --temperature 0
"""

from __future__ import annotations

import argparse
import sys

import config  # noqa: F401  # isort: skip  # before torch, whose threads it teaches to wait
import torch

from config import UserError
from hub.llama import load_decoder, resolve
from hub.tokenizers import load_tokenizer
from runtime import machine
from runtime.command import Parser, command
from runtime.log import printable


def stream_text(model, tokenizer, prompt: str, new_tokens: int, temperature: float, top_k: int | None, seed: int,
                device: torch.device):
    """Yield the prompt's continuation piece by piece, whole characters only, until the end-of-text id."""
    start, new_tokens = prepare(model, tokenizer, prompt, new_tokens, device)
    new, shown = [], ""
    for token in model.stream(start, new_tokens, temperature, top_k, seed, tokenizer.vocab_size):
        if token.item() == tokenizer.eos:
            break
        new.append(token.item())
        text = tokenizer.decode(new)
        whole = text.rstrip("\ufffd")  # the last character may still miss bytes
        yield whole[len(shown):]
        shown = whole if whole.startswith(shown) else shown
    yield tokenizer.decode(new)[len(shown):]  # bytes that never became a character


def batch_of_texts(model, tokenizer, prompt: str, count: int, new_tokens: int, temperature: float, top_k: int | None,
                   seed: int, device: torch.device) -> list[str]:
    """`count` continuations of one prompt, drawn together, each up to its end-of-text id."""
    start, new_tokens = prepare(model, tokenizer, prompt, new_tokens, device)
    drawn = model.stream(start.expand(count, -1), new_tokens, temperature, top_k, seed, tokenizer.vocab_size)
    rows = torch.cat(list(drawn), 1).tolist()
    return [tokenizer.decode(row[:row.index(tokenizer.eos)] if tokenizer.eos in row else row) for row in rows]


def fit_for(stream, text: str) -> str:
    """Text as it is, but for a terminal, which would obey what a stranger's model or tokenizer makes of its tokens."""
    return "".join(c if c in "\n\t" else printable(c) for c in text) if stream.isatty() else text


def prepare(model, tokenizer, prompt: str, new_tokens: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """(ids of the prompt (1, T), new tokens that fit behind it). Raises UserError where none do."""
    ids = tokenizer.encode(prompt) or ([tokenizer.eos] if tokenizer.eos is not None else [0])
    if max(ids) >= model.cfg.vocab_size:
        raise UserError(f"--prompt: holds the id {max(ids)}, and the model knows {model.cfg.vocab_size}: its folder's tokenizer "
                        f"is not the one that it was trained with")
    new_tokens = min(new_tokens, model.cfg.max_seq_len - len(ids))
    if new_tokens <= 0:
        raise UserError(f"--prompt: has {len(ids)} tokens, and the model reads {model.cfg.max_seq_len} with its "
                        f"continuation; shorten it")
    return torch.tensor([ids], device=device), new_tokens


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", help="a run, a step folder, or a Llama folder")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    parser.add_argument("--tokens", type=int, default=200, help="new tokens at most (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest only (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; the same seed gives the same text (default: 0)")
    parser.add_argument("--samples", type=int, default=1, help="continuations of each prompt, drawn as one batch (default: 1)")
    args = parser.parse_args()
    for name, value, least, most in (("tokens", args.tokens, 1, 2 ** 24), ("top-k", args.top_k, 1, 2 ** 31),
                                     ("samples", args.samples, 1, 2 ** 20), ("seed", args.seed, 0, 2 ** 63 - 1)):
        if not least <= value <= most:
            raise UserError(f"--{name}: {value} must be from {least} to {most}")
    if not (args.temperature == 0 or 1e-3 <= args.temperature <= 1e3):
        raise UserError(f"--temperature: {args.temperature} must be 0 or from 0.001 to 1000")
    for prompt in args.prompt or ():
        prompt.encode("utf-8")  # raises UnicodeEncodeError for what is no text
    return args


def main() -> None:
    args = parse()
    folder = resolve(args.model)
    device = machine.pick_device()
    model, tokenizer = load_decoder(folder).to(device), load_tokenizer(folder)
    for prompt in args.prompt or [""]:
        head = f"--- {folder}, temperature {args.temperature}, seed {args.seed}"
        how = (args.tokens, args.temperature, args.top_k, args.seed, device)
        if args.samples > 1:
            for number, text in enumerate(batch_of_texts(model, tokenizer, prompt, args.samples, *how), 1):
                print(fit_for(sys.stdout, f"{head}, {number} of {args.samples}\n{prompt}{text}"))
            continue
        prepare(model, tokenizer, prompt, args.tokens, device)  # what is wrong with the prompt is told before it is shown
        print(fit_for(sys.stdout, f"{head}\n{prompt}"), end="", flush=True)
        for piece in stream_text(model, tokenizer, prompt, *how):
            print(fit_for(sys.stdout, piece), end="", flush=True)
        print()


if __name__ == "__main__":
    command(main)
