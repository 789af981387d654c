"""The model is GPT-2: equal to the original, causal, blind to padding; and log-probs come from the right position."""

import math

import pytest
import torch
import torch.nn.functional as F

from minirlaif.model import GPT, GPTConfig, attend, response_mask, rows_where, token_logprobs

CONFIG = GPTConfig(block_size=24, vocab_size=37, n_layer=2, n_head=2, n_embd=16)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model(config=CONFIG, std=0.2):
    """Random weights, biases and norms too, large enough for attention to matter."""
    generator = rng()
    model = GPT(config).init_weights(generator).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + (p if p.dim() == 1 else 0))
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(CONFIG.vocab_size, (3, 20), generator=rng(1))


# the network


def test_it_is_gpt2(model, tokens):
    """The same weights in Hugging Face's GPT-2 give the same logits. (There, linear layers store their transpose.)"""
    transformers = pytest.importorskip("transformers")
    c = CONFIG
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    ours = {
        name if name.startswith("lm_head") else f"transformer.{name}": w.t() if name.endswith(linear) else w
        for name, w in model.state_dict().items()
    }
    missing, unexpected = theirs.load_state_dict(ours, strict=False)
    assert not unexpected and all(name.endswith(("attn.bias", "masked_bias")) for name in missing)  # constant masks
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_no_token_sees_the_future(model, tokens):
    changed = tokens.clone()
    changed[:, 12:] = (tokens[:, 12:] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], atol=1e-5, rtol=0)
    assert (before[:, 12:] - after[:, 12:]).abs().amax(-1).min() > 1e-2


@torch.no_grad()
def test_every_token_sees_all_of_the_past(model, tokens):
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 1) % CONFIG.vocab_size
    assert (model(tokens) - model(changed)).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_padding_and_neighbours_change_nothing_but_rounding(model, tokens):
    length, prompt_len = torch.tensor([20, 7, 13]), torch.tensor([5, 2, 12])
    mask = response_mask(prompt_len, length, 20)
    together, _ = token_logprobs(model, tokens, mask)
    padded = F.pad(tokens, (0, 4), value=3)
    wide, _ = token_logprobs(model, padded, F.pad(mask, (0, 4)))
    torch.testing.assert_close(wide[:, :20], together, atol=1e-5, rtol=0)
    for row, n in enumerate(length):
        alone, _ = token_logprobs(model, tokens[row : row + 1, :n], mask[row : row + 1, :n])
        torch.testing.assert_close(together[row, :n], alone[0], atol=1e-5, rtol=0)


def test_too_long_is_an_error_with_both_lengths(model):
    model(torch.zeros(1, 24, dtype=torch.long))
    with pytest.raises(ValueError, match="25 tokens do not fit a context of 24"):
        model(torch.zeros(1, 25, dtype=torch.long))


def test_the_head_is_tied_and_stays_tied(tokens):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.wte.weight.detach().clone()
    model(tokens).logsumexp(-1).sum().backward()
    optimizer.step()
    copy = GPT(CONFIG)
    copy.load_state_dict(model.state_dict())
    for m in (model, copy):
        assert m.lm_head.weight.data_ptr() == m.wte.weight.data_ptr()
        assert torch.equal(m.lm_head.weight, m.wte.weight)
    assert not torch.equal(before, model.wte.weight)
    assert sum(p is model.wte.weight for p in model.parameters()) == 1  # one update, not two


def test_dropout_is_off_in_eval_and_on_in_training(tokens):
    config = GPTConfig(**{**vars(CONFIG), "dropout": 0.5})
    model = make_model(config)
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens), make_model()(tokens))  # eval: as if there were none
    model.train()
    assert not torch.allclose(model(tokens), model(tokens))


def test_initialisation_is_gpt2s():
    """N(0, 0.02), residual projections smaller by sqrt(2 layers), biases 0, norms 1; from the generator alone."""
    config = GPTConfig(block_size=64, vocab_size=300, n_layer=8, n_head=2, n_embd=64)
    model, again = (GPT(config).init_weights(rng(5)) for _ in range(2))
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        if p.dim() == 2:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)), name
    idx = torch.randint(300, (4, 64), generator=rng(6))
    loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(300), abs=0.1)  # it knows nothing


def test_bf16_attention_on_a_cpu_is_attention():
    """The path that is written out for speed, against the fused kernel in fp32, values and gradients."""
    q, k, v = (torch.randn(2, 3, 17, 8, generator=rng(i)).bfloat16() for i in range(3))
    ours = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    y, z = attend(*ours), F.scaled_dot_product_attention(*exact, is_causal=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), z, atol=3e-2, rtol=0)  # bf16 keeps 8 bits: 1/256 of values of about 3
    weight = torch.randn(y.shape, generator=rng(9))
    (y.float() * weight).sum().backward()
    (z * weight).sum().backward()
    for a, b in zip(ours, exact, strict=True):
        assert (a.grad.float() - b.grad).norm() / b.grad.norm() < 2e-2


# log-probs


def test_response_mask_is_prompt_len_to_length():
    mask = response_mask(torch.tensor([2, 0, 3]), torch.tensor([4, 1, 3]), 5)
    expected = [[0, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert mask.dtype == torch.bool and mask.int().tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_against_a_loop(model, tokens, temperature):
    """Token t is predicted by the logits at t - 1, of a model that was shown tokens 0 .. t-1 and no more."""
    mask = response_mask(torch.tensor([4, 1, 10]), torch.tensor([20, 9, 11]), 20)
    logprobs, entropy = token_logprobs(model, tokens, mask, temperature)
    assert logprobs.shape == entropy.shape == tokens.shape and logprobs.dtype == torch.float32
    for b in range(3):
        for t in range(20):
            if not mask[b, t]:
                assert logprobs[b, t] == 0 and entropy[b, t] == 0
                continue
            p = (model(tokens[b : b + 1, :t])[0, -1] / temperature).softmax(-1)
            assert logprobs[b, t].item() == pytest.approx(p[tokens[b, t]].log().item(), abs=1e-5)
            assert entropy[b, t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)


@torch.no_grad()
def test_entropy_is_between_0_and_log_v(tokens):
    mask = response_mask(torch.tensor([1, 1, 1]), torch.tensor([20, 20, 20]), 20)
    for std in (1e-3, 0.2, 3.0):  # from uniform to nearly certain
        _, entropy = token_logprobs(make_model(std=std), tokens, mask)
        assert entropy.min() >= 0 and entropy.max() <= math.log(CONFIG.vocab_size) + 1e-5
    _, uniform = token_logprobs(make_model(), tokens, mask, temperature=1e6)
    assert uniform[mask].min().item() == pytest.approx(math.log(CONFIG.vocab_size), abs=1e-4)


@torch.no_grad()
def test_the_softmax_is_fp32_under_autocast(model, tokens):
    """Only the logits are rounded to bf16: temperature, log-softmax and entropy of them are exact."""
    mask = response_mask(torch.tensor([4, 1, 10]), torch.tensor([20, 9, 11]), 20)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = token_logprobs(model, tokens, mask, 0.7)
        logits = model.logits(rows_where(model.hidden(tokens)[:, :-1], mask[:, 1:]))[: mask.sum()]
    logp = (logits.double() / 0.7).log_softmax(-1)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logprobs[mask].double(), logp.gather(-1, tokens[mask][:, None]).squeeze(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy[mask].double(), -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=0)


def test_the_first_token_has_no_prediction(model, tokens):
    logprobs, _ = token_logprobs(model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert (logprobs[:, 0] == 0).all() and (logprobs[:, 1:] < 0).all()


def test_an_empty_mask_gives_zeros(model, tokens):
    logprobs, entropy = token_logprobs(model, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    assert not logprobs.any() and not entropy.any()


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_chunks_change_neither_values_nor_gradients(tokens, chunk):
    """The head runs in chunks that backward computes again: against the whole (B, T, V) log-softmax."""
    model, mask = make_model(), response_mask(torch.tensor([4, 1, 10]), torch.tensor([20, 9, 11]), 20)
    weight = torch.randn(3, 20, generator=rng(2))
    logprobs, _ = token_logprobs(model, tokens, mask, temperature=0.8, chunk=chunk)
    (logprobs * weight).sum().backward()
    chunked = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    whole = F.log_softmax(model(tokens)[:, :-1] / 0.8, -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    whole = F.pad(whole, (1, 0)) * mask
    (whole * weight).sum().backward()
    torch.testing.assert_close(logprobs, whole, atol=1e-5, rtol=0)
    for a, p in zip(chunked, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-4, rtol=1e-4)


def test_the_logits_of_a_chunk_are_not_kept_for_backward(tokens):
    """What is saved between forward and backward holds nothing of size (..., V)."""
    model, mask = make_model(), torch.ones_like(tokens, dtype=torch.bool)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        token_logprobs(model, tokens, mask)
    assert saved and not [s for s in saved if s[-1:] == (CONFIG.vocab_size,)]


def test_rows_where_takes_the_rows_in_order_and_fills_up_with_copies():
    h, where = torch.randn(2, 5, 3, generator=rng()), torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]).bool()
    rows = rows_where(h, where, multiple=8)
    assert rows.shape == (8, 3) and torch.equal(rows[:4], h[where]) and (rows[4:] == h[0, 0]).all()
    assert rows_where(h, where, multiple=4).shape == (4, 3) and rows_where(h, where & False).shape == (0, 3)
