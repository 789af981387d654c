"""Command lines from dataclasses: the fields of a script's `Args` are its flags.

A script declares `@dataclass class Args`, writes `def main(args: Args)`, and ends with `cli.run(main, Args)`. Other code
calls `main(Args(out=...))` directly. There is no registry, config file or inheritance: one dataclass is one command line.
"""

import argparse
import dataclasses
import errno
import math
import sys
import types
import typing

MISSING = dataclasses.MISSING


class UserError(Exception):
    """Something that the user can put right. The message is one line: what is wrong, where, and what to do."""


def arg(default=MISSING, help="", choices=None, positional=False, empty=False):
    """A dataclass field with its help text, given by keyword only. Without a default the flag is required.

    positional: on the command line the value stands alone, without a flag (one such field, a required list).
    empty: the flag may be given an empty text, which is a mistake elsewhere (a variable of the shell that is not set).
    """
    metadata = {"help": help, "choices": choices, "positional": positional, "empty": empty}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def parse(Args, argv=None, word=None):
    """argv (sys.argv[1:] when None) -> Args; a wrong flag is one line on stderr and exit code 2. word: see `run`.

    `field_name` is the flag `--field-name`. Types come from the annotations: str, int, float, list[...] (several values
    after one flag), any of them `| None`, and bool, which is False until the flag is named.
    """
    about = (Args if word else sys.modules[Args.__module__]).__doc__ or ""
    # allow_abbrev: a shortened flag would change its meaning when a second flag with the same start is added
    parser = _Parser(description=about.strip().split("\n\n")[0], allow_abbrev=False)
    if word:
        parser.prog += f" {word}"
    hints = typing.get_type_hints(Args)
    for field in dataclasses.fields(Args):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        kind, several = _value_type(hints[field.name])
        shown = "required" if default is MISSING else f"default: {default!r}" if default == "" else f"default: {default}"
        text = f"{field.metadata.get('help', '')} ({shown})".strip().replace("%", "%%")
        options = {"dest": field.name, "help": text}
        if default is MISSING:
            options["required"] = True
        else:
            options["default"] = default
        if kind is bool:
            assert default is False, f"{field.name}: a flag without a value can only switch something on"
            options["action"] = "store_true"
        else:
            options |= {"type": kind, "choices": field.metadata.get("choices"), "nargs": "+" if several else None}
            if not options["choices"]:
                options["metavar"] = kind.__name__.upper()
        if field.metadata.get("positional"):
            parser.add_argument(field.name, nargs="+", type=kind, metavar=field.name.upper(), help=text)
        else:
            parser.add_argument("--" + field.name.replace("_", "-"), **options)
    args = Args(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(Args):
        value = getattr(args, field.name)
        if "" in (value if isinstance(value, list) else [value]) and not field.metadata.get("empty") and value != field.default:
            fail(f"--{field.name.replace('_', '-')}: is empty; give it a value, or leave it out")
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print every flag before its message
        fail(f"{message} (--help lists the flags)")


def _value_type(hint):
    """Annotation -> (type of one value, whether the flag takes several): `list[str]` -> (str, True)."""
    if isinstance(hint, types.UnionType):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


def require_positive(args, *names):
    """UserError for a number of `args` that must be above 0 and is not (infinity and NaN are not). None: not given."""
    _require(args, names, "above 0", lambda x: 0 < x < math.inf)


def require_not_negative(args, *names):
    """The same for numbers that may be 0."""
    _require(args, names, "0 or more", lambda x: 0 <= x < math.inf)


def require_share(args, *names):
    """The same for numbers that must lie in [0, 1)."""
    _require(args, names, "at least 0 and below 1", lambda x: 0 <= x < 1)


def _require(args, names, what, holds):
    for name in names:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {what}")


def run(main, Args, argv=None, words=None, again=""):
    """Parse, call main(args), and turn what the user can put right into one line on stderr.

    words: {word: (main, Args)}, what the script does when its first argument is that word; the docstring of such an Args is
    what its --help says. again: how to go on after Ctrl-C, for scripts without --resume.
    Exit code 2 for a UserError, a wrong flag, a file that cannot be read or written and a full disk; 130 after Ctrl-C.
    Everything else is our bug and keeps its traceback.
    """
    argv, word = sys.argv[1:] if argv is None else argv, None
    if words and argv and not argv[0].startswith("-"):
        word, *argv = argv
        if word not in words:
            fail(f"{word}: no such word; there are {', '.join(words)}, or flags alone (--help lists them)")
        main, Args = words[word]
    args = parse(Args, argv, word)
    try:
        main(args)
    except UserError as e:
        fail(e)
    except KeyboardInterrupt:
        again = "run again with --resume to continue" if hasattr(args, "resume") else again
        print("; ".join(filter(None, ("\ninterrupted", again))), file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if e.filename is None and e.errno != errno.ENOSPC:
            raise
        fail(f"{e.filename}: {e.strerror}" if e.filename else e.strerror)


def fail(message):
    """Print `error: message` as one line on stderr and exit with code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)
