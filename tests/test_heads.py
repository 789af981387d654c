"""Reward and value heads: which position is read, what padding changes (nothing), and what a copy carries over."""

import copy

import pytest
import torch

from minirlaif.heads import RewardModel, ValueModel
from minirlaif.model import GPT, GPTConfig, response_mask


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_gpt(seed=0, n_embd=32):
    return GPT(GPTConfig(block_size=32, vocab_size=17, n_layer=2, n_head=2, n_embd=n_embd)).init_weights(rng(seed)).eval()


def reward_model(seed=0):
    model = RewardModel(tiny_gpt(seed), generator=rng(seed)).eval()
    model.gain.fill_(2.5)
    model.bias.fill_(-0.7)
    return model


def samples():
    tokens = torch.randint(0, 17, (5, 20), generator=rng(1))
    return tokens, torch.tensor([1, 4, 7, 2, 10]), torch.tensor([5, 20, 8, 12, 19])  # prompt_len, length


def test_score_is_read_at_the_last_real_token():
    model, (tokens, _, length) = reward_model(), samples()
    scores = model(tokens, length)
    for row in range(5):
        h = model.gpt.hidden(tokens[row : row + 1, : length[row]])[0, -1]
        torch.testing.assert_close(scores[row], 2.5 * model.head(h)[0] - 0.7, atol=1e-5, rtol=0)


def test_score_ignores_pads_and_neighbours():
    model, (tokens, _, length) = reward_model(), samples()
    scores = model(tokens, length)
    t = torch.arange(20)
    other_pads = torch.where(t < length[:, None], tokens, (tokens + 3) % 17)
    torch.testing.assert_close(model(other_pads, length), scores, atol=0, rtol=0)
    longer = torch.cat([tokens, torch.zeros(5, 9, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(longer, length), scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(tokens[2:3], length[2:3]), scores[2:3], atol=1e-5, rtol=0)


def test_score_depends_on_the_last_token_and_on_the_prompt():
    model, (tokens, _, length) = reward_model(), samples()
    scores = model(tokens, length)
    for position in (length - 1, torch.zeros_like(length)):
        changed = tokens.scatter(1, position[:, None], (tokens.gather(1, position[:, None]) + 1) % 17)
        assert (model(changed, length) != scores).all()


def test_value_is_what_was_known_before_the_token():
    """values[b, t] comes from tokens[b, :t]: the token that is being judged must not be seen."""
    reward, (tokens, prompt_len, length) = reward_model(), samples()
    value_model, mask = ValueModel(reward), response_mask(prompt_len, length, 20)
    values = value_model(tokens, mask)
    assert (values[~mask] == 0).all() and (values[mask] != 0).all()
    for row, t in [(0, 1), (0, 4), (1, 19), (3, 7)]:
        # right after the copy, V before token t is the score of the text up to t
        prefix = reward(tokens[row : row + 1, :t], torch.tensor([t]))
        torch.testing.assert_close(values[row, t : t + 1], prefix, atol=1e-5, rtol=0)
        changed = tokens.clone()
        changed[row, t:] = (changed[row, t:] + 1) % 17
        torch.testing.assert_close(value_model(changed, mask)[row, : t + 1], values[row, : t + 1], atol=1e-6, rtol=0)


def test_value_ignores_extra_pads():
    value_model, (tokens, prompt_len, length) = ValueModel(reward_model()), samples()
    values = value_model(tokens, response_mask(prompt_len, length, 20))
    longer = torch.cat([tokens, torch.zeros(5, 9, dtype=torch.long)], dim=1)
    again = value_model(longer, response_mask(prompt_len, length, 29))
    torch.testing.assert_close(again[:, :20], values, atol=1e-5, rtol=0)
    assert (again[:, 20:] == 0).all()


def test_head_starts_with_std_of_one_over_root_d_plus_one():
    head = RewardModel(tiny_gpt(n_embd=1024), generator=rng()).head
    assert head.weight.std().item() * (1024 + 1) ** 0.5 == pytest.approx(1, abs=0.1) and head.bias.item() == 0


def test_the_seed_decides_the_head():
    a, b, c = (RewardModel(tiny_gpt(), generator=rng(seed)).head.weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_value_model_from_a_gpt_starts_at_zero_and_learns():
    tokens, prompt_len, length = samples()
    value_model, mask = ValueModel(tiny_gpt()), response_mask(prompt_len, length, 20)
    values = value_model(tokens, mask)
    assert (values == 0).all()
    ((values - 1) ** 2)[mask].sum().backward()
    assert value_model.head.weight.grad.abs().max() > 0


def test_a_value_model_is_a_copy_with_gain_and_bias():
    reward = reward_model().requires_grad_(False)
    value_model = ValueModel(reward)
    assert value_model.gain == 2.5 and value_model.bias == -0.7
    assert all(p.requires_grad for p in value_model.parameters())
    before = copy.deepcopy(reward.state_dict())
    with torch.no_grad():
        for p in value_model.parameters():
            p.add_(1.0)
    assert all(torch.equal(x, before[name]) for name, x in reward.state_dict().items())
    assert value_model.gpt.lm_head.weight is value_model.gpt.wte.weight  # a copy stays tied


def test_normalise_gives_mean_zero_and_std_one_also_twice():
    model, (tokens, _, length) = reward_model(), samples()
    before = model(tokens, length)
    model.normalise(before.detach())
    scores = model(tokens, length)
    assert scores.mean().abs() < 1e-5 and scores.std().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(scores.argsort(), before.argsort())
    model.normalise(scores.detach())
    torch.testing.assert_close(model(tokens, length), scores, atol=1e-5, rtol=0)
    copied = RewardModel(tiny_gpt())
    copied.load_state_dict(model.state_dict())
    torch.testing.assert_close(copied(tokens, length), model(tokens, length), atol=0, rtol=0)


@pytest.mark.parametrize("scores", [[1.0], [2.0, 2.0]])
def test_normalise_needs_a_spread(scores):
    with pytest.raises(ValueError, match="cannot normalise"):
        reward_model().normalise(torch.tensor(scores))


def test_scores_and_values_are_fp32_under_autocast():
    reward, (tokens, prompt_len, length) = reward_model(), samples()
    with torch.autocast("cpu", torch.bfloat16):
        scores, values = reward(tokens, length), ValueModel(reward)(tokens, response_mask(prompt_len, length, 20))
    assert scores.dtype == values.dtype == torch.float32
    torch.testing.assert_close(scores, reward(tokens, length), atol=0.15, rtol=0)
    assert (scores != scores.bfloat16().float()).any()
