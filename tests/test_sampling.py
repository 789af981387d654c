"""Decoding against the plain forward: cached rows are the rows alone, and samples follow the softmax."""

import pytest
import torch
import torch.nn.functional as F

from minirlaif.model import GPT, GPTConfig, KVCache
from minirlaif.sampling import generate, sample_token

V, EOT = 29, 28
CONFIG = GPTConfig(block_size=32, vocab_size=V, n_layer=2, n_head=2, n_embd=16)
PROMPTS = [[3], [5, 1, 4, 9, 2, 6], [7, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22]]


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(0)
    model = GPT(CONFIG).init_weights(generator).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p if p.dim() == 1 else 0))
    return model


class Counting(GPT):
    """A model with a known answer: the previous token plus one (after V - 2 comes EOT). `sure`: its logit; 0 is uniform."""

    def __init__(self, sure=50.0, block_size=32):
        super().__init__(GPTConfig(block_size, V, n_layer=1, n_head=1, n_embd=V))
        self.sure = sure

    def hidden(self, idx, cache=None):
        if cache is not None:
            cache.used += idx.shape[1]
        return F.one_hot((idx + 1) % V, V).float()

    def logits(self, h):
        return self.sure * h


class Fixed(GPT):
    """Always the same next-token distribution."""

    def __init__(self, probs):
        super().__init__(GPTConfig(8, len(probs), n_layer=1, n_head=1, n_embd=1))
        self.log_probs = torch.tensor(probs).log()

    def logits(self, h):
        return self.log_probs.expand(*h.shape[:-1], -1)


def responses(samples):
    """(ids, stopped) of each row, straight from the tensors: end-of-text included."""
    return [
        (samples.tokens[b, samples.prompt_len[b] : samples.length[b]].tolist(), bool(samples.stopped[b]))
        for b in range(len(samples.tokens))
    ]


# the cache


@torch.no_grad()
def test_cache_equals_the_full_forward_for_every_row_of_a_ragged_batch(model):
    """Prefill the right-padded prompts, feed ten tokens one at a time: the hidden states are those of each row alone."""
    length = torch.tensor([len(p) for p in PROMPTS])
    tokens = torch.full((5, 13), EOT)
    for row, p in zip(tokens, PROMPTS, strict=True):
        row[: len(p)] = torch.tensor(p)
    more = torch.randint(V, (5, 10), generator=torch.Generator().manual_seed(1))
    cache = KVCache(CONFIG, 5, 23, "cpu", torch.float32)
    prefill = model.hidden(tokens, cache)
    cache.length.copy_(length)
    steps = []
    for t in range(10):
        steps.append(model.logits(model.hidden(more[:, t : t + 1], cache)))
        cache.length += 1
    steps = torch.cat(steps, dim=1)  # (B, 10, V)
    for b, n in enumerate(length):
        alone = model(torch.cat([tokens[b, :n], more[b]])[None])[0]
        torch.testing.assert_close(model.logits(prefill[b, :n]), alone[:n], atol=1e-5, rtol=0)
        torch.testing.assert_close(steps[b], alone[n:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_several_tokens_behind_a_prefix(model):
    """Queries behind a cached prefix see all of it and, of each other, only the past."""
    idx = torch.randint(V, (2, 14), generator=torch.Generator().manual_seed(1))
    cache = KVCache(CONFIG, 2, 14, "cpu", torch.float32)
    parts = []
    for part in idx.split([6, 5, 3], dim=1):
        parts.append(model.hidden(part, cache))
        cache.length += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(idx), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="do not fit"):
        model.hidden(idx[:, :1], cache)


@torch.no_grad()
def test_greedy_decoding_is_the_argmax_of_the_full_forward(model):
    samples = generate(model, PROMPTS, 12, EOT, temperature=0)
    for p, (ids, stopped) in zip(PROMPTS, responses(samples), strict=True):
        row = list(p)
        for _ in range(12):
            row.append(model(torch.tensor([row]))[0, -1].argmax().item())
            if row[-1] == EOT:
                break
        assert (ids, stopped) == (row[len(p) :], row[-1] == EOT)


def test_a_batch_is_its_rows_one_by_one(model):
    together = responses(generate(model, PROMPTS, 12, EOT, temperature=0))
    assert together == [responses(generate(model, [p], 12, EOT, temperature=0))[0] for p in PROMPTS]
    order = [3, 0, 4, 2, 1]
    assert responses(generate(model, [PROMPTS[i] for i in order], 12, EOT, temperature=0)) == [together[i] for i in order]


def test_the_cache_takes_the_precision_of_autocast(model):
    """Decoding under bf16 autocast runs, and mostly says the same."""
    with torch.autocast("cpu", torch.bfloat16):
        half = responses(generate(model, PROMPTS, 4, EOT, temperature=0))
    full = responses(generate(model, PROMPTS, 4, EOT, temperature=0))
    assert sum(a[0][0] == b[0][0] for a, b in zip(half, full, strict=True)) >= 4


# stopping


def test_a_known_answer():
    """Rows that finish early or late, or are cut: 24 25 26 27 EOT; the length counts the end-of-text."""
    samples = generate(Counting(), [[23], [0, 1, 10], [26, 27], [9, 20]], 8, EOT, temperature=0)
    assert samples.responses() == [
        [24, 25, 26, 27], [11, 12, 13, 14, 15, 16, 17, 18], [], [21, 22, 23, 24, 25, 26, 27]
    ]  # fmt: skip
    assert samples.prompt_len.tolist() == [1, 3, 2, 2]
    assert samples.length.tolist() == [6, 11, 3, 10]
    assert samples.stopped.tolist() == [True, False, True, True]
    assert samples.tokens.shape == (4, 11)
    assert samples.tokens[0].tolist() == [23, 24, 25, 26, 27, EOT] + [EOT] * 5  # pads are end-of-text
    assert samples.tokens[1].tolist() == [0, 1, *range(10, 19)]


def test_other_ids_may_stop_a_row_too():
    samples = generate(Counting(), [[1], [4], [24]], 8, EOT, temperature=0, stop=(3, 7))
    assert responses(samples) == [([2, 3], True), ([5, 6, 7], True), ([25, 26, 27, EOT], True)]
    assert samples.responses() == [[2], [5, 6], [25, 26, 27]]


def test_a_stop_in_the_last_slot_is_a_stop():
    samples = generate(Counting(), [[24], [23]], 4, EOT, temperature=0)
    assert responses(samples) == [([25, 26, 27, EOT], True), ([24, 25, 26, 27], False)]


def test_rows_that_finish_early_do_not_change_the_others(model):
    """Finished rows leave the batch; the noise of a row is its own, so the rows that go on do not notice."""
    patient = responses(generate(model, PROMPTS * 4, 19, EOT, seed=3))
    stop = {ids[0] for ids, _ in patient[:3]}
    hasty = responses(generate(model, PROMPTS * 4, 19, EOT, seed=3, stop=tuple(stop)))
    for (long, _), (short, stopped) in zip(patient, hasty, strict=True):
        end = next((i + 1 for i, t in enumerate(long) if t in stop | {EOT}), len(long))
        assert short == long[:end] and stopped == (long[end - 1] in stop | {EOT})
    lengths = sorted(len(ids) for ids, _ in hasty)
    assert lengths[4] == 1 and lengths[-1] == 19, "some at once, others long after"


def test_a_prompt_that_leaves_no_room_is_named():
    with pytest.raises(ValueError, match=r"row 2: a prompt of 29 tokens and 4 new ones; the context holds 32"):
        generate(Counting(), [[1], [2] * 28, [3] * 29], 4, EOT)
    with pytest.raises(ValueError, match="row 1: a prompt of 0 tokens"):
        generate(Counting(), [[1], []], 4, EOT)
    full = generate(Counting(), [[1], [2] * 28], 4, EOT, temperature=0)  # exactly full is fine
    assert full.length.tolist() == [5, 32]


def test_training_mode_is_given_back(model):
    model.train()
    generate(model, [[1]], 2, EOT)
    assert model.training
    model.eval()


# randomness


def test_the_same_seed_is_the_same_sample(model):
    a, b, c = (responses(generate(model, PROMPTS, 12, EOT, seed=seed)) for seed in (1, 1, 2))
    assert a == b != c
    torch.manual_seed(99)  # the global generator has no say
    state = torch.get_rng_state()
    assert responses(generate(model, PROMPTS, 12, EOT, seed=1)) == a
    assert torch.equal(torch.get_rng_state(), state)


def frequencies(logits, **how):
    """Shares of each token in 20,000 draws."""
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    drawn = sample_token(logits.expand(len(u), -1), u, **how)
    return drawn.bincount(minlength=len(logits)) / len(u)


LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_softmax(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    assert (frequencies(LOGITS, temperature=temperature) - expected).abs().max() < 0.015  # 4 standard errors


def test_whole_samples_follow_the_softmax(model):
    """Two tokens long, against p(first) p(second | first) from the full forward."""
    n = 4000
    samples = generate(model, [[5, 6]] * n, 2, EOT, temperature=0.8, seed=1)
    with torch.no_grad():
        first = (model(torch.tensor([[5, 6]]))[0, -1] / 0.8).softmax(-1)
        best = int(first[:EOT].argmax())
        second = (model(torch.tensor([[5, 6, best]]))[0, -1] / 0.8).softmax(-1)
    starts = samples.tokens[:, 2]
    assert (starts.bincount(minlength=V) / n - first).abs().max() < 0.035
    chosen = samples.tokens[starts == best, 3]
    assert (chosen.bincount(minlength=V) / len(chosen) - second).abs().max() < 2.5 / len(chosen) ** 0.5


def test_rows_have_noise_of_their_own():
    samples = generate(Fixed([0.25] * 4), [[0]] * 2000, 1, eot=9)
    assert (samples.tokens[:, 1].bincount(minlength=4) / 2000 - 0.25).abs().max() < 0.05


def test_temperature_0_is_greedy():
    assert sample_token(LOGITS[None], torch.tensor([0.999]), temperature=0).item() == 1


@pytest.mark.parametrize("how, kept", [
    (dict(top_k=1), [1]), (dict(top_k=3), [0, 1, 3]), (dict(top_k=99), [0, 1, 2, 3, 4]),
    (dict(top_p=0.5), [1]),  # the probabilities are .12 .56 .03 .21 .08
    (dict(top_p=0.6), [1, 3]), (dict(top_p=0.8), [0, 1, 3]), (dict(top_p=1.0), [0, 1, 2, 3, 4]),
    (dict(top_p=1e-9), [1]), (dict(top_k=3, top_p=0.7), [1, 3]),
])  # fmt: skip
def test_top_k_and_top_p_keep_the_likeliest(how, kept):
    """.. and renormalise among them."""
    seen = frequencies(LOGITS, **how)
    p = LOGITS.softmax(-1)[kept]
    assert seen.nonzero().flatten().tolist() == kept
    assert (seen[kept] - p / p.sum()).abs().max() < 0.015


def test_what_cannot_be_sampled_is_not():
    """Ids without probability, at both ends and inside, at the ends of the noise; and nothing beyond the last id."""
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.3, -torch.inf, -torch.inf])
    u = torch.cat([torch.tensor([0.0, 1 - 2**-24, 1.0]), torch.rand(5000, generator=torch.Generator().manual_seed(0))])
    drawn = sample_token(logits.expand(len(u), -1), u)
    assert set(drawn.tolist()) == {1, 3}
    assert drawn[:3].tolist() == [1, 3, 3]
    wide = torch.zeros(1, 50257)  # a cumulative sum of so many ends short of 1, or past it
    assert sample_token(wide, torch.tensor([1.0])).item() <= 50256
