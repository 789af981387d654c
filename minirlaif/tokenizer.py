"""Byte-pair encodings: the bundled small one, GPT-2's, any .tiktoken file; and how to train one.

tiktoken does the encoding. Text is always ordinary text: a literal "<|endoftext|>" in a data file becomes its letters, never
the command. Left out: special tokens other than end-of-text, whose id is the last one.

    python -m minirlaif.tokenizer --out my.tiktoken --vocab-size 1024
"""

import base64
import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from minirlaif import cli
from minirlaif.cli import UserError
from minirlaif.data import atomic_write

# newlines; words and numbers (three digits at most) with a space before them; signs; any other white space, one by one.
# Each character belongs to one of these, so every text survives. (tiktoken wants \s where a space may also be a \n.)
PATTERN = r"\n+| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s"
TOY = Path(__file__).parent.parent / "data" / "toy.tiktoken"


class Tokenizer:
    """encode / decode with `eot` (the end-of-text id), `n_vocab` (eot included), `name`, and `hash` of the vocabulary."""

    def __init__(self, name, encoding):
        self.name, self.encoding = name, encoding
        self.eot, self.n_vocab = encoding.eot_token, encoding.n_vocab
        ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
        content = repr((encoding._pat_str, ranks, self.eot)).encode()
        self.hash = hashlib.sha256(content).hexdigest()[:16]

    def encode(self, text):
        """str -> list of ids, none of them `eot`."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Ids -> str. End-of-text leaves no trace; bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode([i for i in ids if i != self.eot])


def load_tokenizer(name):
    """"toy" (bundled), "gpt2" (tiktoken downloads it once), "gpt2:FOLDER" (GPT-2's encoder.json, or vocab.json, is there),
    or the path of a .tiktoken file, which is split by PATTERN. UserError: it is missing, or is no such file.
    """
    if name == "gpt2":
        try:
            return Tokenizer(name, tiktoken.get_encoding("gpt2"))
        except OSError as e:  # requests' errors are OSErrors
            raise UserError(
                f"gpt2: the vocabulary cannot be downloaded ({type(e).__name__}); with its encoder.json in a folder, "
                "give the tokenizer as gpt2:FOLDER; or point TIKTOKEN_CACHE_DIR at a folder where tiktoken has kept it"
            ) from None
    if name.startswith("gpt2:"):
        from tiktoken_ext.openai_public import r50k_pat_str  # here, since a plugin's place may change

        return Tokenizer(name, _encoding(name, _read_gpt2(name.removeprefix("gpt2:")), r50k_pat_str))
    return Tokenizer(name, _encoding(name, read_ranks(TOY if name == "toy" else name), PATTERN))


def _encoding(name, ranks, pattern):
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _read_gpt2(folder):
    """GPT-2's encoder.json (Hugging Face: vocab.json) -> {bytes: rank}. Its ids are in merge order, so they are the ranks."""
    paths = [Path(folder) / name for name in ("encoder.json", "vocab.json")]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise UserError(f"gpt2:{folder}: no encoder.json or vocab.json there")
    # GPT-2 writes each byte as a printable character: itself if it is one, else the next free one from U+0100 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    try:
        ids = json.loads(path.read_bytes())
        ranks = {bytes(byte[c] for c in token): i for token, i in ids.items() if token != "<|endoftext|>"}
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"{path}: not GPT-2's vocabulary") from None
    return _checked(ranks, path)


def read_ranks(path):
    """A .tiktoken file (each line: base64 of the token's bytes, its rank) -> {bytes: rank}."""
    try:
        lines = [line.split() for line in Path(path).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as e:
        raise UserError(f"{path}: no such tokenizer: {e.strerror} (known names: toy, gpt2, gpt2:FOLDER)") from None
    except ValueError:
        raise UserError(f"{path}: not a .tiktoken file") from None
    return _checked(ranks, path)


def _checked(ranks, path):
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise UserError(f"{path}: the vocabulary is not complete (a rank or one of the 256 bytes is missing)")
    return ranks


def write_ranks(path, ranks):
    """{bytes: rank} -> a .tiktoken file, atomically."""
    with atomic_write(path) as f:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(token) + b" %d\n" % rank)


def train_bpe(texts, vocab_size):
    """Texts -> {bytes: rank} of vocab_size - 1 tokens (end-of-text is the last id), fewer when nothing is left to merge.

    Merge the commonest pair of neighbours, again and again (Sennrich et al. 2016, algorithm 1), over the bytes of the pieces
    that PATTERN cuts. Pairs are counted by the bytes they make, and each piece is always cut as tiktoken will cut it. Ties
    go to the smaller bytes, so that the result depends on the counts alone.
    """
    words = Counter(piece for text in texts for piece in regex.findall(PATTERN, text))
    counts = {word.encode(): n for word, n in words.items()}
    ranks = {bytes([b]): b for b in range(256)}
    parts = {word: [bytes([b]) for b in word] for word in counts}
    pairs, home = Counter(), defaultdict(set)  # merged bytes -> how often, and in which words (some may have left since)

    def count(word, sign):
        for a, b in pairwise(parts[word]):
            pairs[a + b] += sign * counts[word]
            home[a + b].add(word)

    for word in parts:
        count(word, +1)
    while len(ranks) < vocab_size - 1 and pairs:
        best = min(pairs, key=lambda token: (-pairs[token], token))
        if pairs[best] < 2:
            break
        ranks[best] = len(ranks)
        for word in home.pop(best):
            count(word, -1)
            parts[word] = _cut(parts[word], ranks)
            count(word, +1)
        del pairs[best]
    return ranks


def _cut(parts, ranks):
    """Merge neighbours until none can be: the lowest rank first, then the leftmost, as tiktoken does."""
    while True:
        known = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not known:
            return parts
        _, i = min(known)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]


@dataclass
class Args:
    out: str = cli.arg(help="the .tiktoken file to write")
    vocab_size: int = cli.arg(1024, "number of tokens, end-of-text included")
    texts: int = cli.arg(20000, "how many texts of the toy world to train on")
    seed: int = cli.arg(0, "seed of the texts")


def main(args):
    """Train an encoding on the toy world's pretraining text."""
    from minirlaif.corpus import texts  # here, since the corpus is not needed to read an encoding

    cli.require_positive(args, "texts")
    if args.vocab_size <= 257:
        raise UserError(f"--vocab-size {args.vocab_size}: 256 bytes and end-of-text alone take 257")
    ranks = train_bpe(texts(args.texts, args.seed), args.vocab_size)
    write_ranks(args.out, ranks)
    print(f"{args.out}: {len(ranks) + 1} tokens")


if __name__ == "__main__":
    cli.run(main, Args)
