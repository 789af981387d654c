"""What every training script shares: device, precision, optimizer, schedule, seeds, the run folder and model files.

A run killed at any moment and resumed ends with the weights of a run that was never stopped, bit for bit on a CPU. Three
rules make it so: all that is needed to continue is in state.pt, which is replaced atomically; nothing depends on the state of
a global random generator (noise comes from `rng(seed, what, step)`, so counters are enough); and precision and thread count
are decided once and kept in args.json, not measured anew.

Of several processes (ddp.py) the first writes, for all. Left out: gradient scaling for fp16, experiment trackers.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import signal
import sys
import threading
import time
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import torch

from minirlaif import constitution, ddp
from minirlaif.cli import UserError
from minirlaif.data import atomic_write, sync
from minirlaif.heads import RewardModel
from minirlaif.model import GPT, GPTConfig
from minirlaif.tokenizer import load_tokenizer

# what torch.load and the look at its result raise for a file that is cut short or foreign
DAMAGED = (EOFError, OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, pickle.UnpicklingError)
DAMAGED += (zipfile.BadZipFile, zlib.error)


def resolve_device(name):
    """"auto" (cuda, else mps, else cpu), "cpu", "cuda" or "mps" -> torch.device. UserError: that device is not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in here.items() if available)
    if not here.get(name.split(":")[0], False):
        raise UserError(f"--device {name}: PyTorch finds no such device here; use --device cpu or auto")
    return torch.device(name)


def resolve_dtype(name, device, model):
    """"auto", "fp32" or "bf16" -> "fp32" or "bf16", the precision of `autocast` (weights stay fp32).

    auto: bf16 on a GPU that has it, fp32 on mps; on a CPU, where either may be the faster by far, the one that is, measured
    on one block of `model` (a GPT, or a model with .gpt) in a few tenths of a second.
    """
    if name != "auto":
        return name
    if device.type != "cpu":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    gpt = getattr(model, "gpt", model)
    block, T, C = gpt.h[0], min(64, gpt.config.block_size), gpt.config.n_embd
    params = [p for p in block.parameters() if p.requires_grad]
    tokens = min(2048, 1e9 / (72 * C * C))  # a pass takes 6 flops a token for each of the 12 C^2 weights: 1 Gflop at most
    rows = max(1, int(tokens / T))
    x = torch.linspace(-1, 1, rows * T * C, device=device).view(rows, T, C).requires_grad_()

    def seconds(dtype):
        start = time.perf_counter()
        with autocast(device, dtype):
            loss = block(x).float().square().mean()
        torch.autograd.grad(loss, [x, *params])  # unlike backward(), leaves .grad alone
        return time.perf_counter() - start

    training = block.training
    block.eval()  # dropout would draw from the global generator
    rounds = [(seconds("bf16"), seconds("fp32")) for _ in range(10)]  # in turn, so that a busy moment disturbs both
    bf16, fp32 = (sorted(times)[2] for times in zip(*rounds, strict=True))  # the first rounds warm up; the rest is noise
    faster = bf16 < 0.9 * fp32  # a near tie goes to the exact one
    block.train(training)
    return "bf16" if faster else "fp32"


def autocast(device, dtype):
    """Context in which matrix products run in `dtype` ("fp32": nothing changes)."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()


def rng(seed, *keys):
    """A CPU torch.Generator that depends on (seed, *keys) alone: rng(seed, "order", epoch), rng(seed, "sample", step)."""
    digest = hashlib.sha256("/".join(map(str, (seed, *keys))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def configure_optimizer(model, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, but_for=()):
    """AdamW over the trainable weights (but for those that have another optimizer). Matrices and embeddings decay; biases
    and norms (1-D) do not."""
    others = {id(p) for p in but_for}
    params = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = params[0].device.type in ("cpu", "cuda")  # 4x faster than the loop even on a CPU (1.4 ms against 5.7 at 1M)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=fused)


def lr_at(step, total, warmup=0, kind="linear", min_ratio=0.0):
    """What to multiply the learning rate by at step 0 <= step < total: up over `warmup` steps, then down to min_ratio at
    `total` in a line or a half cosine (kind "linear", "cosine"), or not at all ("constant")."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[kind]
    return min_ratio + (1 - min_ratio) * left


def check_finite(x, name=""):
    """FloatingPointError, which says where, if a float or tensor in x (or in its dicts, lists and tuples) is NaN or infinite.

    In a `with Run(...)` block it ends the run with one line that adds the step and the last good checkpoint.
    """
    if isinstance(x, dict | list | tuple):
        for key, part in x.items() if isinstance(x, dict) else enumerate(x):
            check_finite(part, f"{name} {key}".strip())
    elif isinstance(x, float | torch.Tensor) and not (finite := torch.as_tensor(x).isfinite()).all():
        raise FloatingPointError(f"{name} is {x if isinstance(x, float) else x[~finite][0].item()}")


def check_whole(file):
    """One of DAMAGED, if the checksums in a file of torch.save do not fit: torch.load does not look, a flipped bit would pass."""
    with zipfile.ZipFile(file) as checksums:
        if damaged := checksums.testzip():
            raise zipfile.BadZipFile(damaged)


class Run:
    """A run folder: args.json, metrics.jsonl, state.pt (and state.prev.pt behind it), model.pt at the end.

        run = Run(args.out, args, args.resume)
        if run.finished: return
        dtype = run.resolve_dtype(device, model)
        state = run.load_state()                        # None at the start
        for step in range(state["step"] if state else 0, args.steps):
            ...
            run.log(step, **metrics)
            run.end_step(step + 1, make_state)          # steps done; saves now and then, and on Ctrl-C
        save_model(run.folder, ...)
        run.finish()

    Also a context manager, which gives Ctrl-C back to Python however the block ends, and turns a FloatingPointError into a
    UserError that names the step and the last good checkpoint. Nothing that is not finite is ever saved.
    """

    def __init__(self, out, args, resume=False, save_every_s=60.0):
        """args: the script's dataclass. UserError: the folder holds a run (and not resume), or one with other flags."""
        if not str(out).strip() or Path(out).is_file():
            raise UserError(f"--out {out}: must name a folder" + (", and this is a file" if str(out).strip() else ""))
        self.folder, self.save_every_s = Path(out), save_every_s
        self.state_file, self.previous_file = self.folder / "state.pt", self.folder / "state.prev.pt"
        self.metrics_file = self.folder / "metrics.jsonl"
        asked = json.loads(json.dumps(asdict(args)))
        stored = _read_json(self.folder / "args.json")
        begun = any((self.folder / name).exists() for name in ("state.pt", "state.prev.pt", "model.pt"))
        if (begun or stored.get("finished")) and not resume:
            raise UserError(f"{out}: holds a run already; add --resume to continue it, or give another --out")
        if begun and not stored:
            raise UserError(f"{out}: holds a run whose args.json is gone; give another --out")
        self.finished = bool(stored.get("finished"))
        self.info = {"args": asked, "inputs": _hashes(asked), "threads": torch.get_num_threads(), "torch": torch.__version__}
        if begun or self.finished:
            _check_same_flags(out, stored.get("args", {}), asked)
            if self.finished:
                if gone := [name for name in stored.get("files", []) if not (self.folder / name).exists()]:
                    raise UserError(f"{out}: finished, but {gone[0]} is gone; give another --out to make it again")
                print(f"{out}: finished already, nothing to do")
            else:
                _check_same_inputs(out, stored.get("inputs", {}), self.info["inputs"])
            self.info |= stored
            torch.set_num_threads(self.info["threads"])
        else:
            if ddp.rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.metrics_file.write_bytes(b"")
            self._write_info()
        self.saved_at, self.interrupted, self.old_handler = time.monotonic(), False, None
        self.step, self.saved_step = 0, None  # steps done, and of these in the last checkpoint
        if not self.finished and threading.current_thread() is threading.main_thread():
            self.old_handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def resolve_dtype(self, device, model):
        """args.dtype resolved: once, then read from args.json, since a second measurement may come out differently."""
        dtype = self.info.get("dtype")
        if dtype is None and ddp.rank() == 0:
            dtype = resolve_dtype(self.info["args"]["dtype"], device, model)
        if self.info.get("dtype") != (dtype := ddp.agree(dtype)):
            self.info["dtype"] = dtype
            self._write_info()
        return dtype

    def load_state(self):
        """The last checkpoint (tensors on the CPU) or None; metrics.jsonl is cut back to where it stood then.

        A state.pt that cannot be read is replaced by state.prev.pt, with a warning. UserError: that one is damaged too.
        """
        state = self._load_state() if ddp.rank() == 0 else None
        if ddp.agree(state is not None):
            if state is None:  # process 0 has seen to it that this file is whole
                state = torch.load(self.state_file, map_location="cpu", weights_only=True)["state"]
            self.step = self.saved_step = state.get("step", 0)
        return state

    def _load_state(self):
        files = [f for f in (self.state_file, self.previous_file) if f.exists()]
        for file in files:
            try:
                check_whole(file)
                saved = torch.load(file, map_location="cpu", weights_only=True)
                state, offset = saved["state"], saved["metrics_bytes"]
            except DAMAGED as e:
                if isinstance(e, OSError) and e.errno in (errno.EIO, errno.EACCES, errno.ESTALE):  # the disk's fault
                    raise UserError(f"{file}: cannot read: {e.strerror}; run again with --resume") from None
                print(f"warning: {file}: damaged ({type(e).__name__})", file=sys.stderr)
                continue
            os.replace(file, self.state_file)  # a damaged state.pt must not become the next state.prev.pt
            os.truncate(self.metrics_file, min(offset, self.metrics_file.stat().st_size))
            return state
        if files:
            raise UserError(f"{self.folder}: no checkpoint can be read; give another --out to start again")
        self.metrics_file.write_bytes(b"")
        return None

    def log(self, step, **metrics):
        """Append {"step": step, **metrics} to metrics.jsonl (six digits). FloatingPointError: a number is not finite."""
        check_finite(metrics)
        row = {"step": step}
        for name, value in metrics.items():
            value = value.item() if isinstance(value, torch.Tensor) else value
            row[name] = float(f"{value:.6g}") if isinstance(value, float) else value
        if ddp.rank() > 0:
            return
        try:
            with open(self.metrics_file, "ab") as f:
                f.write(json.dumps(row).encode() + b"\n")
        except OSError as e:
            raise UserError(f"{self.metrics_file}: cannot write: {e.strerror}") from e

    def save_state(self, state):
        """Write state.pt atomically, the last one behind it as state.prev.pt. UserError: the disk is full (both survive);
        FloatingPointError: not all of it is finite (both survive).

        state: what weights_only loads, that is tensors, numbers, strings, and plain lists, tuples and dicts of them.
        """
        check_finite(state)
        if ddp.rank() == 0:
            sync(self.metrics_file)
            with atomic_write(self.state_file, self.previous_file) as f:
                torch.save({"state": state, "metrics_bytes": self.metrics_file.stat().st_size}, f)
        self.saved_at, self.saved_step = time.monotonic(), state.get("step", 0)

    def end_step(self, step, make_state):
        """After a step: save {"step": step, **make_state()} when save_every_s have passed; on Ctrl-C save and stop."""
        self.interrupted = any(ddp.gather(self.interrupted))
        if self.interrupted or time.monotonic() - self.saved_at >= self.save_every_s:
            self.save_state({"step": step, **make_state()})
        self.step = step
        self.stop_if_interrupted()

    def finish(self):
        """Mark the run as finished; --resume then has nothing to do. Removes nothing."""
        self.info["finished"] = self.finished = True
        kept = [f.name for f in self.folder.iterdir() if not f.name.startswith("state") and f.suffix != ".tmp"]
        self.info["files"] = sorted(kept)
        self._write_info()
        ddp.agree(None)  # the others go on when all is written
        self.stop_if_interrupted()
        self.close()

    def forget(self, *names):
        """Undo what began: remove the run's own files, those of these names and, if it is then empty, the folder."""
        for name in ("args.json", "metrics.jsonl", "state.pt", "state.prev.pt", *names):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def close(self):
        """Give Ctrl-C back to whoever had it. Called by finish, and by leaving a `with` block."""
        if self.old_handler is not None:
            signal.signal(signal.SIGINT, self.old_handler)
            self.old_handler = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()
        if kind is FloatingPointError:
            good = "none yet" if self.saved_step is None else f"step {self.saved_step}"
            advice = f"last good checkpoint: {good}; try a lower --lr, or --dtype fp32"
            raise UserError(f"{self.folder}: step {self.step}: {error}; {advice}") from None

    def _on_interrupt(self, signum, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nstopping after this step (Ctrl-C again: at once, back to the last checkpoint)", file=sys.stderr)

    def stop_if_interrupted(self):
        """KeyboardInterrupt if Ctrl-C was pressed: for long work before the first step, of which there is nothing to save yet."""
        if self.interrupted:
            self.close()
            raise KeyboardInterrupt

    def _write_info(self):
        if ddp.rank() > 0:
            return
        with atomic_write(self.folder / "args.json") as f:
            f.write(json.dumps(self.info, indent=2).encode() + b"\n")


def _read_json(path):
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict) or not all(isinstance(content.get(key, {}), dict) for key in ("args", "inputs")):
        raise UserError(f"{path}: not the JSON of a run; give another --out to start again")
    return content


def _reached(value):
    """The value of a flag; of an endpoint NAME@URL,option=value,... without what decides how it is reached and paid, not what it
    answers: a run that met the wrong port, or prices, can go on with the right ones."""
    if isinstance(value, list):
        return [_reached(v) for v in value]
    if not isinstance(value, str) or not re.match(r"[^,]*@https?://", value):
        return value
    return re.sub(r"(?<=@)https?://[^,]*|,(concurrency|retries|timeout|price)=[^,]*", "", value)


def _check_same_flags(out, stored, asked):
    for name, value in asked.items():
        # max_cost too decides only how far a run gets, not what comes out
        if name not in ("out", "resume", "device", "max_cost") and _reached(stored.get(name, value)) != _reached(value):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{out}: {flag} was {stored[name]} in this run, not {value}; resume with the same flags")


def _hashes(asked):
    """{path: hash} of every file or model that a flag names, since a resumed run must read what it began with."""
    # policies are NAME=PATH or NAME=PATH+preamble, judges PATH,option=FILE, rewards judge:PATH,constitution=FILE
    values = [(flag, v) for flag, value in asked.items() for v in (value if isinstance(value, list) else [value])]
    files = {}
    for flag, value in values:
        # stored targets say themselves where they are from, and are large
        for part in {value, *value.split(",")} if isinstance(value, str) and flag not in ("out", "store_targets") else ():
            for name in {part, re.sub(r"^(judge:|\w+=)|\+preamble$", "", part)} - {""}:
                if flag == "constitution" or part.startswith("constitution="):
                    name = str(constitution.path_of(name))
                files[name] = _model_file(name)
                if flag == "reward_model" and ":" in name:  # module:function
                    files[name] = Path(name.partition(":")[0].replace(".", "/") + ".py")
    # os.path: a long text of a flag is no file name, and pathlib would raise
    return {name: file_hash(file) for name, file in files.items() if os.path.isfile(file)}


def file_hash(path):
    """Of a file, or a run folder's model; of a model.pt with an adapter beside it, of both: either may be what a run reads."""
    file = _model_file(path)
    both = file.name == "model.pt" and (adapter := file.with_name("adapter.pt")).exists()
    return hashlib.sha256(file.read_bytes() + (adapter.read_bytes() if both else b"")).hexdigest()[:16]


def _check_same_inputs(out, stored, now):
    for path, digest in now.items():
        if digest != stored.get(path, digest):
            raise UserError(f"{out}: {path} has changed since this run began; give another --out to start again")


def save_model(path, config, state_dict, kind="gpt", tokenizer_name=None, extra=None):
    """Write model.pt, what the next stage reads: config, weights, kind ("gpt", "reward"), and the tokenizer by name and hash.

    path: a file, or a run folder (then its model.pt). extra: a dict of plain values and tensors, kept beside them.
    FloatingPointError: a weight is not finite; nothing is written.
    """
    check_finite(state_dict)
    if ddp.rank() > 0:
        return
    content = {"kind": kind, "config": asdict(config), "model": state_dict, "tokenizer": tokenizer_name, **(extra or {})}
    content["tokenizer_hash"] = load_tokenizer(tokenizer_name).hash if tokenizer_name else None
    with atomic_write(_model_file(path)) as f:
        torch.save(content, f)


def read_model(path, kind=None):
    """What save_model wrote, as a dict with tensors on the CPU; path: the file or its run folder.

    UserError, with the path as it was typed: missing, half-written, no model file, or a model of another kind.
    """
    file = _model_file(path)
    if not file.exists():
        why = "no model.pt there (a run writes it at its end)" if Path(path).is_dir() else "no such model file or run folder"
        raise UserError(f"{path}: {why}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        GPTConfig(**content["config"]), content["kind"], content["model"]
    except DAMAGED:
        raise UserError(f"{path}: not a complete model file of this project") from None
    if kind is not None and content["kind"] != kind:
        raise UserError(f"{path}: holds a model of kind '{content['kind']}', where '{kind}' is needed")
    return content


def _model_file(path):
    return Path(path) / "model.pt" if os.path.isdir(path) else Path(path)


def load_gpt(path, device="cpu"):
    """A GPT from a model file or run folder, in eval mode. UserError as in read_model."""
    return _load(path, device, "gpt", lambda gpt: gpt)


def load_reward(path, device="cpu"):
    """A RewardModel from a model file or run folder, in eval mode. UserError as in read_model."""
    return _load(path, device, "reward", RewardModel)


def _load(path, device, kind, build):
    content = read_model(path, kind)
    model = build(GPT(GPTConfig(**content["config"])))
    try:
        model.load_state_dict(content["model"])
    except RuntimeError:
        raise UserError(f"{path}: the weights do not fit the configuration that is stored with them") from None
    return model.to(device).eval()


def tokenizer_of(*paths):
    """The one tokenizer of all these models. UserError: they differ, or it is not what the models were trained with."""
    contents = [read_model(path) for path in paths]
    first = contents[0]
    for path, content in zip(paths, contents, strict=True):
        if content["tokenizer_hash"] != first["tokenizer_hash"]:
            raise UserError(f"{path}: its tokenizer {content['tokenizer']} is not {first['tokenizer']}, that of {paths[0]}")
    if first["tokenizer"] is None:
        raise UserError(f"{paths[0]}: the model file names no tokenizer")
    try:
        tokenizer = load_tokenizer(first["tokenizer"])
    except UserError as e:
        raise UserError(f"{paths[0]}: this model's tokenizer: {e}") from None
    if tokenizer.hash != first["tokenizer_hash"] or tokenizer.n_vocab != first["config"]["vocab_size"]:
        raise UserError(f"{paths[0]}: the vocabulary {tokenizer.name} is not the one that this model was trained with")
    return tokenizer
