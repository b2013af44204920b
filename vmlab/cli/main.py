"""``vmlab <verb>``: finds the verb's file, runs it, turns errors into exit statuses.

A verb is one module here with two functions:

    configure(parser: argparse.ArgumentParser) -> None    its options, and an example in ``parser.epilog``
    run(arguments: argparse.Namespace) -> int             does it; the return value is the exit status

and one line in :data:`VERBS`. Only the module of the verb that was named is imported.

Exit status: 0 done; 1 a cell failed or a claim could not be evaluated (or a check of ``doctor`` failed);
2 wrong usage or configuration; 3 a mistake in vmlab itself; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from vmlab import __version__
from vmlab.cli.output import tame_streams
from vmlab.errors import ConfigError, GuestImageError, VmlabError

OK, FAILED, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130

#: Verb -> what it does, in the order in which help shows them.
VERBS = {
    "demo": "what one CLI costs under each technique, on one screen",
    "experiment": "run a matrix of cells from a YAML file; price, judge and chart it",
    "run": "run one workload under one technique and print its ledger",
    "claims": "the textbook's sentences, each tested by an experiment, with verdict and figures",
    "probe": "really run sensitive instructions at CPL 0, 1 and 3 and compare",
    "measure": "a cost profile of this machine, as far as user mode and KVM can measure it",
    "compare": "what changed between two runs, with limits for a continuous check",
    "cite": "the documents behind a run's prices, as BibTeX",
    "report": "a run's page and charts made anew from its results",
    "plot": "one chart of a run for a paper or a slide: pdf, svg, png or csv",
    "trace": "a run event by event: what the guest did, what followed, state and cycles",
    "translate": "guest code beside its binary translation, unit by unit, with counts and cycles",
    "step": "one CLI, five ways: a page to step through what every technique does",
    "explain": "a term, event, cost or claim in two sentences, with its source",
    "exits": "why the CPU left the guest in a run, by reason; also as perf kvm stat prints it",
    "new": "something to start from: a strategy of your own, or the coursework",
    "answer": "is the answer to an exercise of the coursework right?",
    "list": "techniques, guests, workloads, profiles, claims, experiments, events",
    "validate": "check experiment files without running them",
    "doctor": "check that this machine can run the lab",
}

EXAMPLE = """\
example:
  vmlab experiment cli_heavy      run the experiment of that name that comes with vmlab
  vmlab list                      see what there is
  vmlab VERB --help               options of a verb, with an example
"""


def parser() -> argparse.ArgumentParser:
    """The top-level parser: it knows the verbs' names and summaries, not their options."""
    width = max(map(len, VERBS)) + 2
    verbs = "".join(f"  {name:<{width}}{summary}\n" for name, summary in VERBS.items())
    top = argparse.ArgumentParser(
        prog="vmlab", usage="vmlab [--version] VERB ...", allow_abbrev=False,
        description=f"A laboratory of CPU virtualization.\n\nverbs:\n{verbs}", epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"vmlab {__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    top.add_argument("verb", nargs="?", metavar="VERB", help=argparse.SUPPRESS)
    top.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return top


def dispatch(argv: Sequence[str]) -> int:
    """Parse ``argv``, import the one verb it names, run it."""
    top = parser()
    chosen = top.parse_args(argv)
    if chosen.verb is None:
        top.print_help()
        return USAGE
    if chosen.verb not in VERBS:
        from vmlab.parameters import nearest

        raise ConfigError(f"{chosen.verb!r} is not a verb of vmlab{nearest(chosen.verb, VERBS)}")
    module = importlib.import_module(f"vmlab.cli.{chosen.verb}")
    verb = argparse.ArgumentParser(
        prog=f"vmlab {chosen.verb}", description=VERBS[chosen.verb], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.configure(verb)
    status: int = module.run(verb.parse_args(chosen.rest))
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """The ``vmlab`` command. Returns the exit status; never raises for an error that has a status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments[:1]
    tame_streams()
    try:
        status = dispatch(arguments)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a usage error
        return stop.code if isinstance(stop.code, int) else USAGE
    except KeyboardInterrupt:
        print("vmlab: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone: that is its choice. Point stdout elsewhere, so that the
        # interpreter's own flush at exit has nothing to complain about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except VmlabError as error:
        if debug:
            traceback.print_exc()
        print(f"vmlab: {error}", file=sys.stderr)
        return USAGE if isinstance(error, ConfigError | GuestImageError) else FAILED
    except Exception as error:  # noqa: BLE001
        if debug:
            traceback.print_exc()
        print(f"vmlab: internal error: {type(error).__name__}: {error}\n"
              "vmlab: this is a mistake in vmlab; 'vmlab --debug VERB ...' shows where", file=sys.stderr)
        return INTERNAL


if __name__ == "__main__":
    raise SystemExit(main())
