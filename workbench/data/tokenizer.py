"""The built-in tokenizer: one token for every word of the world, bytes for everything else, so that
no text is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def build_tokenizer(words: Iterable[str], max_length: int = 256) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose vocabulary is ``words`` plus the 256 bytes.

    A word of the list is one token (``ignore_merges`` looks whole words up first); any other word
    falls back to its bytes. BOS is put in front of every text and padding is on the right.

    Args:
        words: the words that get a token of their own. A word is stored with its leading space.
        max_length: the model's context length in tokens.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    vocabulary: dict[str, int] = {token: index for index, token in enumerate((PAD, BOS, EOS))}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(symbol, len(vocabulary))
    for word in sorted(set(words)):
        pieces = byte_level.pre_tokenize_str(word)
        for piece, _ in pieces:
            vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, BOS, EOS)])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS} $B",
                special_tokens=[(BOS, vocabulary[BOS])],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=max_length,
    )
