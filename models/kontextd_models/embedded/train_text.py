"""Stage "text": two tokenizers, and the two text encoders as readers of instructions. Knows nothing of pictures.

Each encoder learns to tell the first and the second edit a prompt asks for (both "none" for any other prompt) through a
linear read-out that is thrown away afterwards; the embeddings then carry it for the transformer.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer, T5Tokenizer

from kontextd_models.embedded import architecture, wordings
from kontextd_models.embedded.edits import COLOUR, IDENTITY
from kontextd_models.embedded.loop import Schedule, run

_SCHEDULE = Schedule(steps=1600, learning_rate=2e-3, weight_decay=0.01)
_BATCH = 64
_CORPUS = 30_000


@dataclass(frozen=True)
class Prompt:
    text: str
    classes: tuple[int, int]  # `IDENTITY` where there is no edit


def draw(rng: random.Random, known: frozenset[str]) -> Prompt:
    """Half single instructions, a quarter joined colour edits, a quarter anything else."""
    kind = rng.random()
    if kind < 0.45:
        index = rng.randrange(IDENTITY)
        return Prompt(wordings.single(index, rng), (index, IDENTITY))
    if kind < 0.7:
        first, second = rng.sample(COLOUR, 2)
        return Prompt(wordings.joined(first, second, rng), (first, second))
    return Prompt(wordings.other(rng, known), (IDENTITY, IDENTITY))


def _corpus() -> list[str]:
    rng, known = random.Random(0), wordings.known_prompts()
    return [draw(rng, known).text for _ in range(_CORPUS)]


def make_tokenizers(work: Path) -> None:
    """A byte-level BPE in CLIP's layout and a Unigram in T5's, both trained on the wordings."""
    corpus = _corpus()
    _clip_tokenizer(corpus, work / "tokenizer")
    _t5_tokenizer(corpus, work / "tokenizer_2")


def _clip_tokenizer(corpus: list[str], out: Path) -> None:
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learned.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    learned.train_from_iterator(corpus, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]  # Any: annotated as text
    # CLIP's order: bytes, bytes that end a word, merges, the two special tokens.
    pieces = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=architecture.CLIP_TOKENS)
    tokenizer.save_pretrained(out)


def _t5_tokenizer(corpus: list[str], out: Path) -> None:
    """SentencePiece, as for the real T5; its case-folding normaliser makes case irrelevant."""
    out.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(out / "spiece"), model_type="unigram", vocab_size=1200,
        normalization_rule_name="nmt_nfkc_cf", character_coverage=1.0, num_threads=1, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    (out / "spiece.vocab").unlink()
    tokenizer = T5Tokenizer.from_pretrained(out, model_max_length=architecture.PROMPT_TOKENS, extra_ids=0)
    tokenizer.save_pretrained(out)


class Reader(nn.Module):
    """Both encoders and their read-outs: prompts → the logits of the first and the second edit, twice."""

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.t5_tokenizer = T5Tokenizer.from_pretrained(work / "tokenizer_2")
        self.clip = architecture.clip(
            len(self.clip_tokenizer),
            self.clip_tokenizer.bos_token_id,
            self.clip_tokenizer.eos_token_id,
            self.clip_tokenizer.pad_token_id,
        )
        self.t5 = architecture.t5(len(self.t5_tokenizer))
        self.clip_read_out = nn.Linear(architecture.TEXT_WIDTH, 2 * (IDENTITY + 1))
        self.t5_read_out = nn.Linear(architecture.TEXT_WIDTH, 2 * (IDENTITY + 1))

    def embed(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """T5's sequence [B, L, D] and CLIP's pooled [B, D], as `FluxKontextPipeline.encode_prompt` makes them."""
        device = self.clip_read_out.weight.device
        cut = {"truncation": True, "return_tensors": "pt"}
        # CLIP is causal and pools at the end mark: padding after it changes nothing, so there is as little as will do.
        clip_ids = self.clip_tokenizer(prompts, padding=True, max_length=architecture.CLIP_TOKENS, **cut).input_ids
        t5_ids = self.t5_tokenizer(
            prompts, padding="max_length", max_length=architecture.PROMPT_TOKENS, **cut
        ).input_ids
        return self.t5(t5_ids.to(device))[0], self.clip(clip_ids.to(device)).pooler_output

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Logits [B, 2, classes] by T5 and by CLIP."""
        sequence, pooled = self.embed(prompts)
        shape = (len(prompts), 2, IDENTITY + 1)
        return self.t5_read_out(sequence.mean(1)).view(shape), self.clip_read_out(pooled).view(shape)


def train(work: Path, device: torch.device, steps: int | None) -> None:
    if not (work / "tokenizer_2").exists():
        make_tokenizers(work)
    torch.manual_seed(0)
    reader, known = Reader(work).to(device), wordings.known_prompts()

    def loss_of(step: int, rng: random.Random) -> Tensor:
        batch = [draw(rng, known) for _ in range(_BATCH)]
        classes = torch.tensor([prompt.classes for prompt in batch], device=device)
        by_t5, by_clip = reader([prompt.text for prompt in batch])
        return functional.cross_entropy(by_t5.flatten(0, 1), classes.flatten()) + functional.cross_entropy(
            by_clip.flatten(0, 1), classes.flatten()
        )

    schedule = _SCHEDULE if steps is None else Schedule(steps, _SCHEDULE.learning_rate)
    run(reader, reader.parameters(), loss_of, schedule, work / "text.safetensors")
