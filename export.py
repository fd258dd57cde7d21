"""Hugging Face folders, out and in: weights as a plain Llama, adapters merged; published weights as ours; uploads.

    python export.py hf runs/demo OUT --dtype bfloat16      # a run's newest step for transformers, vLLM, llama.cpp
    python export.py import pico-lm/pico-decoder-tiny OUT   # a published Pico model, or a Llama folder, to use here
    python export.py upload runs/demo                       # what a run has not yet uploaded
    python export.py verify owner/name --revision step-3000 # whether the Hub serves what the run has written
"""

from __future__ import annotations

from pathlib import Path

import config  # noqa: F401  # isort: skip  # before torch, whose threads it teaches to wait
import torch

from checkpoint import CheckpointError, publish
from config import DatasetConfig
from hub import published, served, uploads
from hub.architecture import not_llama
from hub.folders import read_json, resolve
from hub.llama import OWN, load_plain, writers
from runtime.command import Parser, command


def verify(repo: str, revision: str, download: bool) -> None:
    right, wrong = served.verify_served(repo, revision, DatasetConfig.patience_minutes, download)
    if wrong:
        raise CheckpointError(f"{repo} at {revision}: {len(wrong)} of {right + len(wrong)} files are not what the run wrote: "
                              f"{'; '.join(wrong)}")
    print(f"{repo} at {revision}: {right} files are what the run wrote")


def main() -> None:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    hf = commands.add_parser("hf", help="write a plain Llama folder")
    hf.add_argument("checkpoint", help="a run (its newest step), a step folder, or a model folder")
    hf.add_argument("out", type=Path, help="the folder to make")
    hf.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    imported = commands.add_parser("import", help="read a published Pico model or a Llama folder")
    imported.add_argument("source", help="a folder, or owner/name on the Hub")
    imported.add_argument("out", type=Path, help="the folder to make")
    imported.add_argument("--revision", help="a commit or branch on the Hub")
    imported.add_argument("--tokenizer", type=Path, help="a tokenizer.json, or its folder, where the source has none")
    uploaded = commands.add_parser("upload", help="send to the Hub what a run has not sent yet")
    uploaded.add_argument("run", type=Path, help="a run folder trained with checkpointing.hf_checkpoint.repo_id")
    verified = commands.add_parser("verify", help="compare what the Hub serves with the manifest of the run")
    verified.add_argument("repo", help="owner/name on the Hub")
    verified.add_argument("--revision", required=True, help="a tag such as step-3000, a branch or a commit")
    verified.add_argument("--download", action="store_true", help="fetch large files too, in place of asking for their SHA-256")
    args = parser.parse_args()
    if args.command == "verify":
        verify(args.repo, args.revision, args.download)
        return
    if args.command == "upload":
        uploads.upload_run(args.run)
        return
    if args.out.exists():
        raise CheckpointError(f"{args.out}: is already there; choose another folder, or delete it first")
    if args.command == "hf":
        folder = resolve(args.checkpoint)
        cfg, state = load_plain(folder)
        if reason := read_json(folder / "config.json").get(OWN) or not_llama(cfg):
            raise CheckpointError(f"{folder}: is no Llama ({reason}), and no program but this lab would compute the same with "
                                  "it; use the step folder as it is")
        publish(args.out, writers(state, cfg, folder, getattr(torch, args.dtype)), anew=True)
    else:
        published.import_model(args.source, args.out, args.revision, args.tokenizer)
    print(f"written to {args.out}")


if __name__ == "__main__":
    command(main)
