"""The command line is the dataclass: flags, types, defaults, help, and one-line errors with their exit codes."""

import errno
from dataclasses import dataclass

import pytest

from minirlaif import cli


@dataclass
class Args:
    out: str = cli.arg(help="run folder")
    n_layer: int = cli.arg(4, "number of layers; 100% whole")
    lr: float = cli.arg(3e-4, "learning rate")
    device: str = cli.arg("auto", "where to run", choices=["auto", "cpu"])
    files: list[str] = cli.arg([], "text files")
    limit: int | None = cli.arg(None, "at most this many rows")
    resume: bool = cli.arg(False, "continue a run")


def error_of(capsys, call):
    """Run call, which must exit: (exit code, stderr lines)."""
    with pytest.raises(SystemExit) as exit:
        call()
    return exit.value.code, capsys.readouterr().err.strip().splitlines()


def test_defaults_and_keywords_agree():
    assert cli.parse(Args, ["--out", "x"]) == Args(out="x")


def test_every_type():
    argv = ["--out", "x", "--n-layer", "2", "--lr", "1e-5", "--device", "cpu", "--files", "a", "b", "--limit", "3", "--resume"]
    expected = Args(out="x", n_layer=2, lr=1e-5, device="cpu", files=["a", "b"], limit=3, resume=True)
    assert cli.parse(Args, argv) == expected


def test_list_defaults_are_not_shared():
    Args(out="x").files.append("a")
    assert Args(out="y").files == []


def test_help_shows_text_and_default_of_every_flag(capsys):
    with pytest.raises(SystemExit):
        cli.parse(Args, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for part in ["--out", "run folder (required)", "100% whole (default: 4)", "learning rate (default: 0.0003)",
                 "{auto,cpu}", "at most this many rows (default: None)", "continue a run (default: False)"]:
        assert part in shown


@pytest.mark.parametrize("argv, part", [
    (["--out", "x", "--bogus", "1"], "--bogus"),
    (["--out", "x", "--n-lay", "1"], "--n-lay"),  # no abbreviations
    (["--out", "x", "--n-layer", "two"], "two"),
    (["--out", "x", "--device", "tpu"], "tpu"),
    ([], "--out"),
])
def test_wrong_flags_are_one_line_and_code_2(capsys, argv, part):
    code, lines = error_of(capsys, lambda: cli.parse(Args, argv))
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and part in lines[0]


@pytest.mark.parametrize("error, code, line", [
    (cli.UserError("a.jsonl:3: no key 'prompt'"), 2, "error: a.jsonl:3: no key 'prompt'"),
    (cli.UserError("two\nlines"), 2, "error: two lines"),
    (KeyboardInterrupt(), 130, "interrupted; run again with --resume to continue"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"), 2, "error: a.json: No such file or directory"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: Permission denied"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
])
def test_run_turns_errors_into_one_line(capsys, error, code, line):
    def main(args):
        raise error

    assert error_of(capsys, lambda: cli.run(main, Args, ["--out", "x"])) == (code, [line])


def test_ctrl_c_says_how_to_go_on_without_resume(capsys):
    @dataclass
    class Plain:
        out: str = cli.arg("x", "folder")

    def main(args):
        raise KeyboardInterrupt

    for again, line in (("", "interrupted"), ("start it again", "interrupted; start it again")):
        assert error_of(capsys, lambda again=again: cli.run(main, Plain, [], again=again)) == (130, [line])


def test_bugs_keep_their_traceback():
    def main(args):
        raise ValueError("a bug")

    with pytest.raises(ValueError):
        cli.run(main, Args, ["--out", "x"])


def test_numbers_that_must_be_positive_are_named():
    from types import SimpleNamespace

    cli.require_positive(SimpleNamespace(batch_size=1, limit=None), "batch_size", "limit")  # None: not given
    for check, good, bad in (
        (cli.require_positive, (1, 1e-9), (0, -1, float("nan"), float("inf"))),
        (cli.require_not_negative, (0, 2), (-1e-9, float("nan"), float("inf"))),
        (cli.require_share, (0, 0.99), (-0.1, 1, float("nan"))),
    ):
        for value in good:
            check(SimpleNamespace(batch_size=value), "batch_size")
        for value in bad:
            with pytest.raises(cli.UserError, match=f"--batch-size {value}: must be"):
                check(SimpleNamespace(batch_size=value), "batch_size")


def test_an_empty_text_is_a_mistake_but_where_it_means_something(capsys):
    @dataclass
    class Texts:
        out: str = cli.arg("runs", "folder")
        files: list[str] = cli.arg([], "files")
        note: str = cli.arg("", "empty by default")
        preamble: str | None = cli.arg(None, "may be empty", empty=True)

    for argv, flag in ((["--out", ""], "--out"), (["--files", "a", ""], "--files")):
        with pytest.raises(SystemExit) as stop:
            cli.parse(Texts, argv)
        assert stop.value.code == 2 and capsys.readouterr().err == f"error: {flag}: is empty; give it a value, or leave it out\n"
    assert cli.parse(Texts, ["--preamble", "", "--note", ""]).preamble == ""
