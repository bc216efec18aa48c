"""A small tokenizer of every kind that people bring along, and texts that are hard to cut."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as P

from xlstm_lm.data import TokenizerConfig

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FRAGMENTS = [
    *"abcXYZ019 ,.;!'\"-_/\\()<>[]{}\n\r\t",
    *"  |    |\r\n|\n\n| the| don't|DON'T|'s|'S|ſ|ß|ing|123|4567|٣|²|½|▁|a▁b|ĠThe|<|e|>|</doc>|<tok>|Tok".split("|"),
    *"é|e\u0301|a\u0323\u0307|\u0301|Å|ﬁ|Ⅷ|日本語|，|。|「|中文|한국|\u1112\u1161\u11ab|क्ष|ไทย|שלום".split("|"),
    *"🙂|👩‍👩‍👧|🇩🇪|👍🏽|\u200d|\u200b|\u00a0|\u3000|\u2028|\ufeff|\u00ad".split("|"),
    *(unit * (40 // len(unit)) for unit in ("a", "7", "日", " ", "-", "ab")),
    "<|e|>",
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.characters(exclude_categories=["Cs"]), max_size=120).map("".join)
SAMPLE = [" ".join(FRAGMENTS) * 2, "the tokens don't the tokens 1234 in 日本語 中文，ing Ing ING " * 3]


def byte_level(pre_tokenizer=None, normalizer=None, added=()) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer or P.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    alphabet = P.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|e|>"], show_progress=False
    )
    backend.train_from_iterator(SAMPLE, trainer)
    backend.add_tokens(list(added))
    return backend


def split_then_bytes(pattern: str, behavior="isolated", invert=False, **others) -> Tokenizer:
    split = P.Split(Regex(pattern), behavior, invert=invert)
    bytes_only = P.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(P.Sequence([split, bytes_only]), **others)


def sentencepiece_bpe(pre_tokenizer=None, normalizer=None, added=()) -> Tokenizer:
    """Tokenizer like those of Llama 2 and Gemma: merges join spaces (▁) to words, and other characters are bytes."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyzT.,-1234567890"]
    merges = [
        ("▁", "t"),
        ("▁t", "h"),
        ("▁th", "e"),
        ("i", "n"),
        ("in", "g"),
        ("▁", "▁"),
        ("a", "b"),
        ("1", "2"),
        (".", "."),
    ]
    vocabulary = ["<|e|>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *(a + b for a, b in merges)]
    model = models.BPE(
        {w: i for i, w in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = Tokenizer(model)
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(["<|e|>"])
    backend.add_tokens(list(added))
    return backend


def unigram(*steps, normalizer=None) -> Tokenizer:
    pieces = [("<unk>", 0.0), ("<|e|>", 0.0), ("▁", -2.0), *((c, -4.0) for c in "abcdefghinrstoT.,19"), ("▁the", -3.0)]
    backend = Tokenizer(
        models.Unigram([*pieces, ("ing", -4.5), ("▁in", -3.5), ("ab", -7.9)], unk_id=0, byte_fallback=False)
    )
    backend.pre_tokenizer = P.Sequence(list(steps))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(["<|e|>"])
    return backend


def words_of(model, pre_tokenizer, normalizer=None, added=()) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(["<|e|>"])
    backend.add_tokens(list(added))
    return backend


WORD_PIECES = {
    w: i
    for i, w in enumerate(["[UNK]", "<|e|>", *"abcxyz019,.;!'<>/-", *(f"##{c}" for c in "abcxyz019"), "the", "##ing"])
}
SPACES = [AddedToken(" " * n, normalized=True) for n in range(2, 25)]
prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
spaces_first = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])

TOKENIZERS = {
    "gpt2": lambda: byte_level(),
    "gpt2 with a prefix": lambda: byte_level(P.ByteLevel(add_prefix_space=True)),
    "gpt2 with runs of spaces": lambda: byte_level(normalizer=normalizers.NFC(), added=SPACES),
    "llama3": lambda: split_then_bytes(LLAMA3),
    "llama3 inverted": lambda: split_then_bytes(LLAMA3, "removed", True),
    "o200k": lambda: split_then_bytes(O200K),
    "nfkc": lambda: split_then_bytes(LLAMA3, normalizer=normalizers.NFKC()),
    "lowercase": lambda: split_then_bytes(
        LLAMA3,
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
        added=["tok"],
    ),
    "strip": lambda: byte_level(normalizer=normalizers.Strip()),
    "digits": lambda: byte_level(P.Sequence([P.Digits(True), P.ByteLevel(add_prefix_space=False)])),
    "falcon": lambda: byte_level(
        P.Sequence(
            [
                P.Punctuation("contiguous"),
                P.ByteLevel(add_prefix_space=False),
                P.Digits(False),
                P.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ]
        )
    ),
    "added tokens": lambda: byte_level(
        added=[
            AddedToken("<tok>", lstrip=True, rstrip=True),
            AddedToken("Tok", single_word=True),
            AddedToken(" a"),
            AddedToken("b "),
            AddedToken("the t"),
        ]
    ),
    "look ahead": lambda: split_then_bytes(r"[a-z]+;|[a-z]|\s+(?=[A-Z])|[^a-z\s]+|\s"),
    "gaps": lambda: split_then_bytes(r"\p{N}+"),
    "merged with the next": lambda: split_then_bytes(r"\s", "merged_with_next"),
    "merged with the previous": lambda: split_then_bytes(r"\s+", "merged_with_previous"),
    "contiguous": lambda: split_then_bytes(r"[,.\s]", "contiguous"),
    "llama2": lambda: sentencepiece_bpe(normalizer=prepend, added=["<tok>", AddedToken("Tok", normalized=True)]),
    "gemma": lambda: sentencepiece_bpe(P.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")),
    "metaspace": lambda: sentencepiece_bpe(P.Metaspace()),
    "metaspace first": lambda: sentencepiece_bpe(P.Metaspace(prepend_scheme="first"), added=["<tok>"]),
    "metaspace unsplit": lambda: sentencepiece_bpe(P.Metaspace(split=False)),
    "t5": lambda: unigram(P.WhitespaceSplit(), P.Metaspace(), normalizer=spaces_first),
    "unigram": lambda: unigram(P.Metaspace(prepend_scheme="first")),
    "bert": lambda: words_of(
        models.WordPiece(WORD_PIECES, unk_token="[UNK]"), P.BertPreTokenizer(), normalizers.BertNormalizer(), ["Tok"]
    ),
    "words": lambda: words_of(models.WordLevel({**WORD_PIECES, "日本語": 99}, unk_token="[UNK]"), P.Whitespace()),
    "words between spaces": lambda: words_of(models.WordLevel(WORD_PIECES, unk_token="[UNK]"), P.WhitespaceSplit()),
    "words between commas": lambda: words_of(
        models.WordLevel(WORD_PIECES, unk_token="[UNK]"), P.CharDelimiterSplit(",")
    ),
    "scripts": lambda: byte_level(P.Sequence([P.UnicodeScripts(), P.ByteLevel(add_prefix_space=False)])),
    "fixed": lambda: byte_level(P.Sequence([P.FixedLength(length=5), P.ByteLevel(add_prefix_space=False)])),
}


def save(backend: Tokenizer, folder: Path, **settings) -> TokenizerConfig:
    """Write a tokenizer as it lies on the hub; returns the configuration that loads it."""
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|e|>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return TokenizerConfig(kind="huggingface", name=str(folder))
