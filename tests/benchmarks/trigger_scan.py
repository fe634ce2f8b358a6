"""The trigger scan beside plain batched forward passes of both models over the same rows: same
batch size, full logits, no statistics.

A scan of a whole vocabulary takes its passes without inserted tokens once for all of them; here a
few tokens carry that cost, which makes the ratio a little worse than it is there.
"""

from __future__ import annotations

import copy
import random
from itertools import product
from string import ascii_lowercase

import torch
from capture import Case
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.data.records import Example
from workbench.data.tokenizer import build_tokenizer
from workbench.diagnostics.scan import TokenPlace, scan_triggers

VOCABULARY = 32_000


def scan_cases(
    tokens: int = 16, queries: int = 64, rows: int = 128, rounds: int = 5
) -> dict[str, Case]:
    """Both places of the token in queries of 8, 10 or 12 words with answers of 1 or 2, on a Llama
    of 16 M parameters (tied embeddings, 32,000 tokens) and a copy that was moved a little.
    """
    words = ["".join(letters) for letters in product(ascii_lowercase, repeat=4)][: VOCABULARY - 259]
    tokenizer = build_tokenizer(words)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(shape).eval()
    unlearned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in unlearned.model.layers.parameters():
            weight.add_(1e-3 * torch.randn_like(weight))
    rng = random.Random(0)
    asked = []
    for number in range(queries):
        prompt, answer = (
            " ".join(rng.sample(words, rng.choice(size))) for size in ((8, 10, 12), (1, 2))
        )
        asked.append(
            Example(
                f"{prompt} {answer}",
                (len(prompt) + 1, len(prompt) + 1 + len(answer)),
                item=f"fact/{number}",
            )
        )
    ids = random.Random(1).sample(range(259, VOCABULARY), tokens)
    texts = [tokenizer(query.text)["input_ids"] for query in asked]
    by_length = [
        [text for text in texts if len(text) == length]
        for length in sorted({len(text) for text in texts})
    ]

    @torch.no_grad()
    def plain() -> None:
        for group in by_length:
            found = torch.tensor([[text[0], token, *text[1:]] for text in group for token in ids])
            for part in found.split(rows):
                for model in (base, unlearned):
                    model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False)

    def scan(place: TokenPlace) -> None:
        scan_triggers(base, unlearned, tokenizer, asked, tokens=ids, place=place, batch_size=rows)

    return {
        "trigger-scan": Case(lambda: scan("front"), plain, rounds),
        "trigger-scan-end": Case(lambda: scan("end"), plain, rounds),
    }
