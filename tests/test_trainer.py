"""Runs that stop and go on, files that are whole or refused, and the small maths of schedule, decay and seeds."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from minirlaif import cli, constitution, trainer
from minirlaif.cli import UserError
from minirlaif.heads import RewardModel
from minirlaif.model import GPT, GPTConfig
from minirlaif.tokenizer import train_bpe, write_ranks

CPU = torch.device("cpu")
TINY = GPTConfig(block_size=8, vocab_size=17, n_layer=1, n_head=2, n_embd=8)


@dataclass
class Args:
    out: str
    steps: int = 12
    lr: float = 1e-2
    seed: int = 0
    device: str = "cpu"
    dtype: str = "fp32"
    resume: bool = False


def tiny(seed=0):
    return GPT(TINY).init_weights(trainer.rng(seed, "init"))


def train(args, before_step=lambda run, step: None, save_every_s=0.0):
    """A training script in small: every part that must come back on resume is in it. Returns the weights."""
    model = tiny(args.seed)
    optimizer = trainer.configure_optimizer(model, args.lr, weight_decay=0.1)
    with trainer.Run(args.out, args, args.resume, save_every_s) as run:
        if run.finished:
            return trainer.load_gpt(args.out).state_dict()
        start = 0
        if state := run.load_state():
            start = state["step"]
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        for step in range(start, args.steps):
            before_step(run, step)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * trainer.lr_at(step, args.steps)
            tokens = torch.randint(17, (4, 8), generator=trainer.rng(args.seed, "batch", step))
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log(step, **{"loss/ce": loss})
            run.end_step(step + 1, lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        trainer.save_model(run.folder, TINY, model.state_dict())
        run.finish()
    return model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics(folder):
    return (folder / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights and metrics of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return train(Args(str(folder))), metrics(folder)


# stopping and going on


@pytest.mark.parametrize("save_every_s", [0.0, 1e9])
def test_a_crash_and_a_resume_change_nothing(tmp_path, uninterrupted, save_every_s):
    """The crash comes after five steps' work, of which the checkpoint holds five (saved each step) or none."""

    def crash(run, step):
        if step == 5:
            run.log(step, **{"loss/ce": 123.0})  # a line that the checkpoint does not know
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError):
        train(Args(str(tmp_path / "a")), crash, save_every_s)
    weights = train(Args(str(tmp_path / "a"), resume=True))
    assert same(weights, uninterrupted[0])
    assert metrics(tmp_path / "a") == uninterrupted[1]


def test_kill_9_and_a_resume_change_nothing(tmp_path, uninterrupted):
    program = (
        "import os, signal, test_trainer as t\n"
        "def die(run, step):\n"
        "    if step == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"t.train(t.Args({str(tmp_path / 'a')!r}), die)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=os.path.dirname(__file__), check=False, capture_output=True,
                            text=True, env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert same(train(Args(str(tmp_path / "a"), resume=True)), uninterrupted[0])
    assert metrics(tmp_path / "a") == uninterrupted[1]


def test_ctrl_c_finishes_the_step_saves_and_stops(tmp_path, uninterrupted, capsys):
    """No checkpoint is due for years: the one that is there was written because of Ctrl-C, after step 3 was done."""
    before = signal.getsignal(signal.SIGINT)

    def press(run, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as exit:
        cli.run(lambda args: train(args, press, 1e9), Args, ["--out", str(tmp_path / "a")])
    assert exit.value.code == 130
    assert "stopping after this step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.load(tmp_path / "a" / "state.pt", weights_only=True)["state"]["step"] == 4
    assert same(train(Args(str(tmp_path / "a"), resume=True)), uninterrupted[0])


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    reached = []

    def press_twice(run, step):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after one")
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after two")

    with pytest.raises(KeyboardInterrupt):
        train(Args(str(tmp_path / "a")), press_twice)
    assert reached == ["after one"]


def test_ctrl_c_during_the_last_work_stops_the_pipeline_too(tmp_path):
    """finish() marks the run, then passes Ctrl-C on: a caller that has more stages must not start the next one."""
    run = trainer.Run(tmp_path / "a", Args("a"))
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    assert trainer.Run(tmp_path / "a", Args("a"), resume=True).finished


def test_a_finished_run_has_nothing_to_resume(tmp_path, capsys):
    def never(run, step):
        raise AssertionError

    args = Args(str(tmp_path / "a"), steps=2)
    weights = train(args)
    assert same(train(replace(args, resume=True), never), weights)
    assert "a: finished already" in capsys.readouterr().out
    (tmp_path / "a" / "model.pt").unlink()
    with pytest.raises(UserError, match="a: finished, but model.pt is gone"):
        trainer.Run(args.out, args, resume=True)


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("a")
    for out, message in (("", "--out : must name a folder"), (str(tmp_path / "file"), "must name a folder, and this is a file")):
        with pytest.raises(UserError, match=message):
            trainer.Run(out, Args(out))


def test_a_run_is_not_overwritten_by_mistake(tmp_path):
    args = Args(str(tmp_path / "a"), steps=2)
    train(args)
    with pytest.raises(UserError, match="a: holds a run already; add --resume"):
        train(args)
    for name in ("args.json", "state.pt", "state.prev.pt"):  # the model alone is worth keeping
        (tmp_path / "a" / name).unlink()
        with pytest.raises(UserError, match="holds a run already"):
            train(args)


def test_without_args_json_nothing_is_trained_over(tmp_path):
    args = Args(str(tmp_path / "a"), steps=2)
    train(args)
    file = tmp_path / "a" / "args.json"
    for content, part in ((None, "a: holds a run whose args.json is gone"), ('{"args": 5}', "args.json: not the JSON of a run")):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(UserError, match=part):
            train(replace(args, resume=True))
    file.write_text('{"args": {}, "inputs": []}')
    with pytest.raises(UserError, match="args.json: not the JSON of a run"):
        train(replace(args, resume=True))


def test_a_run_without_a_checkpoint_starts_again(tmp_path, uninterrupted):
    """It died before it saved anything: nothing is lost by starting anew, with other flags too, with or without --resume."""
    for resume in (False, True):
        trainer.Run(tmp_path / "a", Args("a", lr=5.0)).log(0, loss=1.0)
        assert same(train(Args(str(tmp_path / "a"), resume=resume)), uninterrupted[0])
        assert metrics(tmp_path / "a") == uninterrupted[1]
        for file in (tmp_path / "a").iterdir():
            file.unlink()


def test_resume_needs_the_same_flags(tmp_path):
    args = Args(str(tmp_path / "a"))
    trainer.Run(args.out, args).save_state({})
    with pytest.raises(UserError, match=r"a: --lr was 0.01 in this run, not 0.02"):
        trainer.Run(args.out, replace(args, lr=0.02), resume=True)
    trainer.Run(args.out, replace(args, device="auto", resume=True), resume=True).close()


@dataclass
class ManyArgs(Args):
    judge: list[str] = ()
    policies: list[str] = ()
    reward_model: str = ""
    constitution: str = "mine"


INPUTS = ["judge.pt", "shots.txt", "words.txt", "policy/model.pt", "reward.pt", "mine.json", "own.json"]


@pytest.mark.parametrize("changed", INPUTS)
def test_every_file_that_a_flag_names_must_stay(tmp_path, monkeypatch, changed):
    """Those inside the spec of a judge too, and a constitution that is given by its name."""
    monkeypatch.setattr(constitution, "BUNDLED", tmp_path)
    (tmp_path / "policy").mkdir()
    for name in INPUTS:
        (tmp_path / name).write_text("once")
    judge = f"{tmp_path}/judge.pt,cot=1,exemplars={tmp_path}/shots.txt,preamble={tmp_path}/words.txt"
    reward = f"judge:{tmp_path}/reward.pt,constitution={tmp_path}/own.json"
    args = ManyArgs(str(tmp_path / "a"), judge=[judge], policies=[f"sl={tmp_path}/policy+preamble"], reward_model=reward)
    trainer.Run(args.out, args).save_state({})
    trainer.Run(args.out, args, resume=True).close()
    (tmp_path / changed).write_text("twice")
    shown = f"{tmp_path}/{changed}".removesuffix("/model.pt")  # as it was typed
    with pytest.raises(UserError, match=f"a: {shown} has changed since this run began"):
        trainer.Run(args.out, args, resume=True)


def test_dtype_and_threads_are_decided_once(tmp_path, monkeypatch):
    args = Args(str(tmp_path / "a"), dtype="auto")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(trainer, "resolve_dtype", lambda *_: "bf16")
        with trainer.Run(args.out, args) as run:
            assert run.resolve_dtype(CPU, tiny()) == "bf16"
            run.save_state({})
        torch.set_num_threads(1)
        monkeypatch.setattr(trainer, "resolve_dtype", lambda *_: "fp32")  # the machine is busier today
        with trainer.Run(args.out, args, resume=True) as run:
            assert run.resolve_dtype(CPU, tiny()) == "bf16" and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


# damage


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99, None])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, uninterrupted, capsys, keep):
    """keep: bytes, or share, that is left of state.pt; None: it is gone (killed between the two renames)."""
    args = Args(str(tmp_path / "a"))

    def crash(run, step):
        if step == 6:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(args, crash)
    state = tmp_path / "a" / "state.pt"
    if keep is None:
        state.unlink()
    else:
        os.truncate(state, int(state.stat().st_size * keep) if isinstance(keep, float) else keep)
    with trainer.Run(args.out, args, resume=True) as run:
        assert run.load_state()["step"] == 5
        assert (f"warning: {state}: damaged" in capsys.readouterr().err) == (keep is not None)
        # the good one has taken the damaged one's place, which would else be the fallback of the next save
        assert torch.load(state)["state"]["step"] == 5 and not run.previous_file.exists()
    assert same(train(replace(args, resume=True)), uninterrupted[0])
    assert metrics(tmp_path / "a") == uninterrupted[1]


def test_a_flipped_bit_anywhere_is_seen_or_harmless(tmp_path, capsys):
    """In the tensors too, where torch.load would take it for a weight."""
    args, states = Args(str(tmp_path / "a")), [{"step": n, "model": torch.full((500,), float(n))} for n in (1, 2)]
    with trainer.Run(args.out, args) as run:
        for state in states:
            run.save_state(state)
    files = run.state_file, run.previous_file
    whole = [file.read_bytes() for file in files]
    seen, noise = 0, random.Random(0)
    for place in range(0, len(whole[0]), 7):
        flipped = bytearray(whole[0])
        flipped[place] ^= 1 << noise.randrange(8)
        files[0].write_bytes(flipped)
        files[1].write_bytes(whole[1])
        found = run.load_state()
        damaged = "damaged" in capsys.readouterr().err
        expected = states[0 if damaged else 1]
        assert found["step"] == expected["step"] and torch.equal(found["model"], expected["model"]), place
        seen += damaged
    assert seen > 2000 / 7  # at least the bytes of the tensor


def test_a_disk_that_does_not_answer_costs_no_checkpoint(tmp_path, monkeypatch):
    args = Args(str(tmp_path / "a"))
    with trainer.Run(args.out, args) as run:
        run.save_state({"step": 1})
        run.save_state({"step": 2})
    before = run.state_file.read_bytes()

    def fail(file):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, trainer.Run(args.out, args, resume=True) as run:
        patch.setattr(trainer.zipfile, "ZipFile", fail)
        with pytest.raises(UserError, match="state.pt: cannot read: Input/output error; run again"):
            run.load_state()
    assert run.state_file.read_bytes() == before and run.load_state()["step"] == 2


def test_two_damaged_checkpoints_are_an_error(tmp_path):
    args = Args(str(tmp_path / "a"))
    with trainer.Run(args.out, args) as run:
        run.save_state({})
        run.save_state({})
    for name in ("state.pt", "state.prev.pt"):
        (tmp_path / "a" / name).write_bytes(b"half")
    with trainer.Run(args.out, args, resume=True) as run, pytest.raises(UserError, match="no checkpoint can be read"):
        run.load_state()


def test_a_full_disk_loses_nothing(tmp_path):
    """The limit on file size fails the write in the middle, as a full disk does."""
    run = trainer.Run(tmp_path / "a", Args("a"))
    run.save_state({"step": 1})
    run.save_state({"step": 2})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(UserError, match=rf"state.pt: cannot write: {os.strerror(errno.EFBIG)}"):
            run.save_state({"step": 3, "big": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.close()
    assert sorted(os.listdir(tmp_path / "a")) == ["args.json", "metrics.jsonl", "state.prev.pt", "state.pt"]
    with trainer.Run(tmp_path / "a", Args("a"), resume=True) as run:
        assert run.load_state() == {"step": 2}
        assert torch.load(run.previous_file)["state"] == {"step": 1}


def test_metrics_are_json_with_six_digits_and_finite(tmp_path):
    with trainer.Run(tmp_path / "a", Args("a")) as run:
        run.log(3, **{"loss/ce": torch.tensor(1 / 3), "n": 7, "kl": 123456.789})
        for bad in (float("nan"), torch.tensor(float("inf"))):
            with pytest.raises(FloatingPointError, match="loss is (nan|inf)"):
                run.log(4, loss=bad)
    assert [json.loads(line) for line in metrics(tmp_path / "a").splitlines()] == [
        {"step": 3, "loss/ce": 0.333333, "n": 7, "kl": 123457.0}
    ]


# model files


def test_models_come_back(tmp_path):
    gpt = tiny()
    trainer.save_model(tmp_path, TINY, gpt.state_dict(), extra={"note": "hi"})
    loaded = trainer.load_gpt(tmp_path / "model.pt", CPU)
    assert same(loaded.state_dict(), gpt.state_dict()) and loaded.config == TINY and not loaded.training
    assert loaded.lm_head.weight is loaded.wte.weight  # still tied
    assert trainer.read_model(tmp_path)["note"] == "hi"

    reward = RewardModel(tiny(1))
    reward.normalise(torch.tensor([1.0, 2.0, 4.0]))
    trainer.save_model(tmp_path / "reward.pt", TINY, reward.state_dict(), kind="reward")
    assert same(trainer.load_reward(tmp_path / "reward.pt").state_dict(), reward.state_dict())


def test_files_that_are_no_such_model_are_named_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer.save_model("gpt.pt", TINY, tiny().state_dict())
    trainer.save_model("other.pt", replace(TINY, n_embd=16), tiny().state_dict())
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    os.mkdir("folder")
    for path, load, message in [
        ("./none.pt", trainer.load_gpt, "no such model file or run folder"),
        ("./folder", trainer.load_gpt, "no model.pt there"),
        ("./gpt.pt", trainer.load_reward, "holds a model of kind 'gpt', where 'reward' is needed"),
        ("./foreign.pt", trainer.load_gpt, "not a complete model file"),
        ("./other.pt", trainer.load_gpt, "the weights do not fit"),
    ]:
        with pytest.raises(UserError) as e:
            load(path)
        assert str(e.value).startswith(f"{path}: {message}")


def test_half_written_files_never_pass(tmp_path):
    trainer.save_model(tmp_path / "gpt.pt", TINY, tiny().state_dict())
    whole = (tmp_path / "gpt.pt").read_bytes()
    noise = random.Random(0)
    cuts = [whole[: len(whole) * i // 40] for i in range(40)] + [noise.randbytes(n) for n in range(0, 200, 5)]
    for content in cuts:
        (tmp_path / "cut.pt").write_bytes(content)
        with pytest.raises(UserError, match="cut.pt: not a complete model file"):
            trainer.load_gpt(tmp_path / "cut.pt")


def test_model_and_tokenizer_belong_together(tmp_path):
    names = [str(tmp_path / f"{n}.tiktoken") for n in (258, 259)]
    for name, n in zip(names, (258, 259), strict=True):
        write_ranks(name, train_bpe(["ab\n", "ab\n", "cd\n", "cd\n"], n))
    config = replace(TINY, vocab_size=258)
    for file, tokenizer in (("a.pt", names[0]), ("b.pt", names[1]), ("none.pt", None)):
        trainer.save_model(tmp_path / file, config, GPT(config).state_dict(), tokenizer_name=tokenizer)
    assert trainer.tokenizer_of(tmp_path / "a.pt", tmp_path / "a.pt").n_vocab == 258
    with pytest.raises(UserError, match="names no tokenizer"):
        trainer.tokenizer_of(tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"b.pt: its tokenizer .*259.tiktoken is not .*258.tiktoken, that of .*a.pt"):
        trainer.tokenizer_of(tmp_path / "a.pt", tmp_path / "b.pt")
    with pytest.raises(UserError, match="is not the one that this model was trained with"):
        trainer.tokenizer_of(tmp_path / "b.pt")  # 259 ids for 258 embeddings
    write_ranks(names[0], train_bpe(["xy\n", "xy\n"], 258))
    with pytest.raises(UserError, match="is not the one that this model was trained with"):
        trainer.tokenizer_of(tmp_path / "a.pt")  # the file has another content now


# device, precision, optimizer, schedule, seeds


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_here():
    assert trainer.resolve_device("cpu") == CPU
    with pytest.raises(UserError, match="--device cuda: PyTorch finds no such device here"):
        trainer.resolve_device("cuda")


def test_resolve_dtype_measures_and_leaves_no_trace():
    model = GPT(replace(TINY, dropout=0.5)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reward, state = RewardModel(model), torch.get_rng_state()
    assert trainer.resolve_dtype("auto", CPU, model) in ("fp32", "bf16")
    assert trainer.resolve_dtype("auto", CPU, reward) in ("fp32", "bf16")
    assert same(before, model.state_dict()) and all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state()) and model.h[0].training
    assert trainer.resolve_dtype("bf16", CPU, model) == "bf16"


def test_autocast():
    a = torch.ones(2, 2)
    with trainer.autocast(CPU, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with trainer.autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32


def test_matrices_decay_and_the_rest_does_not():
    """With zero gradients AdamW moves a weight by its decay only: times 1 - lr * weight_decay."""
    model = tiny()
    model.wpe.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = trainer.configure_optimizer(model, lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if p.dim() >= 2 and name != "wpe.weight" else 1.0  # the tied matrix decays once
        torch.testing.assert_close(p.detach(), before[name] * factor)


def test_schedule():
    assert [trainer.lr_at(s, 4) for s in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [trainer.lr_at(s, 6, warmup=2) for s in range(7)] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [trainer.lr_at(s, 4, kind="constant") for s in range(5)] == [1] * 5
    assert [trainer.lr_at(s, 2, kind="cosine", min_ratio=0.1) for s in range(3)] == pytest.approx([1, 0.55, 0.1])
    assert trainer.lr_at(9, 4, min_ratio=0.1) == 0.1  # beyond the end


def test_rng_depends_on_its_keys_alone():
    def draw(*keys):
        return torch.rand(4, generator=trainer.rng(*keys)).tolist()

    torch.manual_seed(1)
    first = draw(0, "batch", 3)
    torch.manual_seed(2)
    assert draw(0, "batch", 3) == first
    assert first not in (draw(1, "batch", 3), draw(0, "batch", 4), draw(0, "sample", 3), draw(0, "batch"))
    # the same on every machine and in every version, or old checkpoints would go on with other noise
    assert trainer.rng(0, "batch", 3).initial_seed() == 96295349605300718
