"""Shared beginnings: the states are those of a plain forward, and what is shared is computed once."""

import itertools
import random

import pytest
import torch

from minirlaif import prefix, trainer
from minirlaif.model import GPT, GPTConfig

CPU, EOT = torch.device("cpu"), 49


@pytest.fixture(scope="module")
def model():
    model = GPT(GPTConfig(96, 50, n_layer=2, n_head=2, n_embd=16)).init_weights(trainer.rng(0))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(10)
    return model.eval()


def tokens(rng, n):
    return [rng.randrange(EOT) for _ in range(n)]


def prompts_of(rng, head, stems, tails):
    """Prompts head + stem + tail, a group for each stem."""
    shared = tokens(rng, head)
    stems = [shared + tokens(rng, n) for n in stems]
    rows = [(g, stem + tokens(rng, n)) for g, stem in enumerate(stems) for n in tails]
    rng.shuffle(rows)
    return [ids for _, ids in rows], [g for g, _ in rows]


def plain(model, prompts):
    with torch.no_grad():
        return torch.stack([model.hidden(torch.tensor([ids]))[0, -1] for ids in prompts])


def test_common_is_the_longest_beginning_short_of_a_last_token():
    rng = random.Random(0)
    for _ in range(300):
        rows = [[rng.randrange(2) for _ in range(rng.randrange(1, 6))] for _ in range(rng.randrange(2, 4))]
        expected = max(n for n in range(min(map(len, rows))) if all(r[:n] == rows[0][:n] for r in rows))
        assert prefix.common(rows) == expected
    assert prefix.common([[1, 2, 3]]) == prefix.common([]) == 0


def test_batches_hold_each_row_once_and_keep_groups_together():
    prompts, groups = prompts_of(random.Random(1), 4, (13, 19, 15, 13), (2, 7))
    found = prefix.batches([i for i in range(8) if i != 3], prompts, groups, 4)
    assert sorted(sum(found, [])) == [0, 1, 2, 4, 5, 6, 7] and max(map(len, found)) == 4
    order = [groups[i] for i in sum(found, [])]
    assert len(list(itertools.groupby(order))) == len(set(order))
    longest = [max(len(prompts[i]) for i in range(8) if i != 3 and groups[i] == group) for group in order]
    assert longest == sorted(longest)


def test_batches_are_of_one_length_where_sharing_does_not_pay():
    prompts, groups = prompts_of(random.Random(1), 0, (3, 9, 5), (20, 3, 30))
    lengths = [len(prompts[i]) for batch in prefix.batches(range(9), prompts, groups, 4) for i in batch]
    assert lengths == sorted(lengths) and len(lengths) == 9
    # behind tokens that all share anyway, what is left decides
    prompts, groups = prompts_of(random.Random(1), 50, (3, 9, 5), (20, 3, 30))
    lengths = [len(prompts[i]) for batch in prefix.batches(range(9), prompts, groups, 4, held=50) for i in batch]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize(
    "head, stems, tails, passes",
    [
        (0, (3, 5), (4, 20, 9), 1),  # nothing to share
        (20, (2, 0), (1, 31), 2),  # all begin alike
        (2, (17, 30), (5, 1, 20), 2),  # conversations alone, of unequal length
        (2, (17, 30), (5, 1, 60), 1),  # ... too short beside what follows
        (17, (38, 39, 40), (3, 1, 39), 3),  # both, up to the last slot of the context (17 + 40 + 39 = 96)
        (30, (18,), (1,), 1),  # one prompt alone shares nothing
    ],
)
def test_states_equal_those_of_a_plain_forward(model, monkeypatch, head, stems, tails, passes):
    prompts, groups = prompts_of(random.Random(2), head, stems, tails)
    expected, read, hidden = plain(model, prompts), [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, cache=None: read.append(idx) or hidden(idx, cache))
    root = prefix.root(model, prompts, EOT)
    assert root.used == (head if head >= prefix.SHARED and len(prompts) > 1 else 0) and root.k.shape[1] == 1
    before = [torch.as_tensor(x).clone() for x in (root.k, root.v, root.used, root.length)]
    for _ in range(2):  # a root serves many batches
        found = prefix.last_hidden(model, prompts, groups, root, EOT)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(read) == 2 * passes - (root.used > 0)
    after = [torch.as_tensor(x) for x in (root.k, root.v, root.used, root.length)]
    assert all(map(torch.equal, before, after))


def test_each_shared_beginning_is_forwarded_once(model, monkeypatch):
    """Tokens that the model reads: the head once, a stem a group, a tail a prompt (padded)."""
    prompts, groups = prompts_of(random.Random(3), 20, (17, 17, 17), (9, 16, 12, 11))
    read, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, cache=None: read.append(tuple(idx.shape)) or hidden(idx, cache))
    root = prefix.root(model, prompts, EOT)
    prefix.last_hidden(model, prompts, groups, root, EOT)
    assert read == [(1, 20), (3, 17), (12, 16)]  # no pads: this is fp32 on a CPU
    assert prefix.root(model, [p[5:] for p in prompts], EOT).used == 0 and len(read) == 3  # 15 tokens are not worth it


def test_a_prompt_beyond_the_context_is_an_error(model):
    prompts = [[1] * 40 + [k] * 57 for k in (2, 3)]
    with pytest.raises(ValueError, match="context of 96"):
        prefix.last_hidden(model, prompts, [0, 1], prefix.root(model, prompts, EOT), EOT)


def test_under_autocast_the_cache_is_bf16_and_the_states_are_near(model):
    prompts, groups = prompts_of(random.Random(4), 20, (18, 18), (9, 16))
    with trainer.autocast(CPU, "bf16"):
        root = prefix.root(model, prompts, EOT)
        found = prefix.last_hidden(model, prompts, groups, root, EOT)
    assert root.k.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), plain(model, prompts), atol=0.2, rtol=0.1)
