"""Prepares the corpus of a config: from text, records, tables, existing token files, or a mixture of sources."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.corpus_folder import prepare_folder
from rwkv_jax.data.encoding import token_byte_lengths
from rwkv_jax.data.numbers import prepare_numbers
from rwkv_jax.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_jax.data.tokens.binidx import Binidx, evenly_spaced_blocks, find_binidx, fingerprint, open_binidx
from rwkv_jax.data.tokens.digest_file import check_fingerprint
from rwkv_jax.data.tokens.mixture import mixture_fingerprint, period_shares
from rwkv_jax.data.tokens.token_file import Corpus, TokenFile, first_wrong_token

_BLOCK_TOKENS = 2**20  # read at once, to bound memory
_MAX_DOCUMENTS_CHECKED = 1000


def prepare_corpus(data: DataConfig, vocab_size: int, report: Callable[[str], None]) -> Corpus:
    """Opens a config's corpus, verified. Text is tokenized once into `data.cache_dir`; token files are memory-mapped.

    The result is the same in every process with the same files; several may call this at once. Each source of a
    mixture holds out its own share. `report` gets lines to print.
    Raises ConfigError for an invalid source, split or tokenizer, and for damaged files.
    """
    if not data.mixture:
        return prepare_source(data, vocab_size, report)
    shares = period_shares(data.mixture)
    parts = [prepare_source(data.of_source(source), vocab_size, report) for source, _ in data.mixture]
    corpus = mix(parts, shares)
    listed = ", ".join(
        f"{source} {share / sum(shares):.2%}" for (source, _), share in zip(data.mixture, shares, strict=True)
    )
    report(f"mixture: {listed}; fingerprint {corpus.fingerprint}")
    return corpus


def mix(parts: Sequence[Corpus], shares: Sequence[int]) -> Corpus:
    """Combines corpora into a mixture; held-out tokens are concatenated in memory."""
    return Corpus(
        sources=tuple(part.train for part in parts),
        shares=tuple(shares),
        held_out=_join([part.held_out for part in parts if part.held_out is not None], parts[0].tokenizer),
        held_out_bytes=lambda: b"".join(part.held_out_bytes() for part in parts),
        tokenizer=parts[0].tokenizer,
        fingerprint=mixture_fingerprint([part.fingerprint for part in parts], shares),
    )


def corpus_of_binidx(opened: Binidx, tokenizer: Tokenizer, held_out: float) -> Corpus:
    """The corpus of existing token files; the last `held_out` of the documents are held out.

    Reads the held-out tokens and at most 64 MiB of the others. Raises ConfigError if no tokens would be left to train
    on or hold out, for a token outside the tokenizer's vocabulary, and for files that differ from their digest.
    """
    tokens, lengths = opened.tokens, token_byte_lengths(tokenizer)
    found = fingerprint(opened)
    check_fingerprint(opened, found)
    num_held_out = max(1, round(held_out * opened.num_documents)) if held_out > 0 else 0
    num_train = opened.num_documents - num_held_out
    if num_train < 1:
        raise ConfigError(
            f"data.held_out = {held_out}: {opened.bin_path} has {opened.num_documents} document(s), which leaves none "
            "to train on; set data.held_out to 0"
        )
    end = opened.document_start(num_train)
    if end < 2 or (num_held_out and end == len(tokens)):
        raise ConfigError(f"data.held_out = {held_out}: {opened.bin_path} has no tokens on one of the two sides")
    train = TokenFile(
        opened.bin_path, tokens[:end], _estimate_bytes(tokens[:end], lengths, opened), num_documents=num_train
    )
    held_out_file = None
    if num_held_out:
        # From the token before, an end_of_text, so that the first held-out token has a predecessor.
        part = tokens[end - 1 :]
        held_out_file = TokenFile(opened.bin_path, part, _count_bytes(part[1:], lengths, opened), num_held_out)
    return Corpus(
        sources=(train,),
        shares=(1,),
        held_out=held_out_file,
        held_out_bytes=functools.partial(_decode, tokens[end:], tokenizer),
        tokenizer=tokenizer,
        fingerprint=hashlib.blake2b(f"{found} {end}".encode(), digest_size=16).hexdigest(),
    )


def prepare_source(data: DataConfig, vocab_size: int, report: Callable[[str], None]) -> Corpus:
    """`prepare_corpus` of `data.source` alone."""
    if data.is_numbers:
        return prepare_numbers(data, vocab_size, report)
    pair = find_binidx(data.source)
    if pair is None:
        return prepare_folder(data, vocab_size, report)
    if data.tokenizer is None:
        raise ConfigError(
            f"data.tokenizer = None: {data.source} holds tokens; name the tokenizer that made them (the official files "
            "are `world`, or 20B_tokenizer.json for the Pile)"
        )
    tokenizer = load_tokenizer(data.tokenizer, vocab_size)
    opened = open_binidx(*pair)
    corpus = corpus_of_binidx(opened, tokenizer, data.held_out)
    for side, file in (("training", corpus.train), ("held-out", corpus.held_out)):
        if file is not None:
            report(
                f"{pair[0]}, {side}: {file.num_documents} documents, {file.num_tokens} tokens, "
                f"{file.bytes_per_token:.3f} bytes/token"
            )
    seen, without_end = _documents_without_end(opened, tokenizer.end_of_text)
    if without_end:
        report(
            f"{pair[0]}: {without_end} of {seen} documents looked at do not end with the tokenizer's end of text, "
            f"{tokenizer.end_of_text}, the only mark of where one document ends and another begins"
        )
    report(f"tokens {pair[0]}, fingerprint {corpus.fingerprint}")
    return corpus


def _documents_without_end(opened: Binidx, end_of_text: int) -> tuple[int, int]:
    """Number of documents checked, evenly spaced, and how many of them do not end with end_of_text."""
    seen = min(opened.num_documents, _MAX_DOCUMENTS_CHECKED)
    ends = (opened.document_start(number * opened.num_documents // seen + 1) for number in range(seen))
    return seen, sum(end == 0 or int(opened.tokens[end - 1]) != end_of_text for end in ends)


def _join(files: Sequence[TokenFile], tokenizer: Tokenizer) -> TokenFile | None:
    """Concatenates held-out tokens, with end_of_text first and between them."""
    if not files:
        return None
    end_of_text = np.array([tokenizer.end_of_text], np.int32)
    mask = None
    if any(file.mask is not None for file in files):
        masks = (np.ones(file.num_tokens, bool) if file.mask is None else file.mask for file in files)
        mask = np.concatenate([np.ones(1, bool), *(mask[1:] for mask in masks)])
    return TokenFile(
        path=files[0].path,
        tokens=np.concatenate([end_of_text, *(file.tokens[1:].astype(np.int32) for file in files)]),
        num_bytes=sum(file.num_bytes for file in files),
        num_documents=sum(file.num_documents for file in files),
        mask=mask,
    )


def _estimate_bytes(tokens: np.ndarray, lengths: np.ndarray, opened: Binidx) -> int:
    """Estimates the UTF-8 bytes of tokens from evenly spaced blocks; exact if these cover all tokens."""
    counted, num_bytes = 0, 0
    for block in evenly_spaced_blocks(len(tokens), tokens.itemsize):
        num_bytes += _count_bytes(tokens[block], lengths, opened)
        counted += block.stop - block.start
    return round(num_bytes * len(tokens) / counted)


def _count_bytes(tokens: np.ndarray, lengths: np.ndarray, opened: Binidx) -> int:
    """Counts the UTF-8 bytes of tokens. Raises ConfigError for a token outside the vocabulary."""
    total = 0
    for start in range(0, len(tokens), _BLOCK_TOKENS):
        span = np.asarray(tokens[start : start + _BLOCK_TOKENS])
        wrong = first_wrong_token(span, len(lengths))
        if wrong is not None:
            raise ConfigError(
                f"{opened.bin_path}: holds the token {span[wrong]}, and the tokenizer has {len(lengths)}; name the "
                "tokenizer that made the file with data.tokenizer"
            )
        total += int(lengths[span.astype(np.int64)].sum())
    return total


def _decode(tokens: np.ndarray, tokenizer: Tokenizer) -> bytes:
    table = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    spans = (tokens[start : start + _BLOCK_TOKENS] for start in range(0, len(tokens), _BLOCK_TOKENS))
    return b"".join(table[token] for span in spans for token in span.astype(np.int64).tolist())
