"""Classes of options: what their command lines accept, say and spell, and that configurations mean the same."""

import importlib
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mxmoe_steps.capture import CaptureOptions
from mxmoe_steps.check import CheckOptions
from mxmoe_steps.config import sections
from mxmoe_steps.evaluate import EvaluateOptions
from mxmoe_steps.frontier import FrontierOptions
from mxmoe_steps.options.base import Options, option_of
from mxmoe_steps.options.command_line import flags, parse
from mxmoe_steps.profile import ProfileOptions
from mxmoe_steps.solve import SolveOptions
from mxmoe_steps.trace import TraceOptions

ROOT = Path(__file__).parents[1]
STEPS = [
    "check", "trace", "capture", "calibrate", "compile", "measure", "profile", "frontier", "solve", "extrapolate",
    "quantize", "tune", "evaluate", "tasks", "time", "report",
]  # fmt: skip
SOURCES: dict[str, Any] = {"b": {"mix": ["a"]}, "a": {"files": ["x y.txt"], "separator": "%"}}
TRACE = {"model": "m", "out": "out", "sources": SOURCES, "texts": ["b", "a"]}


def class_of(step: str) -> type[Options]:
    found: type[Options] = getattr(importlib.import_module(f"mxmoe_steps.{step}"), f"{step.capitalize()}Options")
    return found


def refusal(kind: type[Options], words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that a command line ends with."""
    with pytest.raises(SystemExit) as stop:
        parse(kind, None, shlex.split(words))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().split("\n")[-1]


@given(
    st.builds(
        TraceOptions,
        model=st.text("ab -'\"\\{}", min_size=1).filter(lambda text: not text.startswith("-")),
        sources=st.just(SOURCES),
        texts=st.lists(st.sampled_from(["a", "b c", "d'"]), min_size=1, unique=True),
        sequences=st.integers(1, 1 << 20),
        seed=st.integers(0, (1 << 63) - 1),
        dtype=st.sampled_from(["auto", "float32"]),
        trust_remote_code=st.booleans(),
        until=st.none() | st.integers(1, 9),
        out=st.just(Path("out")),
    )
)
def test_flags_give_back_the_options(options: TraceOptions) -> None:
    assert parse(TraceOptions, None, shlex.split(flags(TraceOptions, options))) == options


@given(st.floats(0, 16, exclude_min=True), st.floats(0, 1))
def test_numbers_lose_nothing(bits: float, gap: float) -> None:
    paths = "--losses a --trace b --profile c --out d"
    text = flags(FrontierOptions, budget_bits=bits, tokens=64, gap=gap)
    options = parse(FrontierOptions, None, shlex.split(f"{text} {paths}"))
    assert (options.budget_bits, options.gap) == (bits, gap)


def test_the_same_options_are_the_same_text_however_they_are_written() -> None:
    one = TraceOptions(**TRACE, seed=3, threads=1)
    two = TraceOptions(threads="1", seed="3", **dict(reversed(TRACE.items())))  # type: ignore[arg-type]
    other = one.model_copy(update={"sources": dict(reversed(SOURCES.items()))})
    assert flags(TraceOptions, one) == flags(TraceOptions, two) == flags(TraceOptions, other)
    words = "--fix a=b c=d --no-tie-gate-up"
    rest = "--losses l --trace t --profile p --out o --tokens 1"
    same = [
        parse(FrontierOptions, None, shlex.split(f"{text} {rest}"))
        for text in (f"--budget-bits 3 {words}", "--no-tie-gate-up --fix a=b --fix c=d --budget-bits 3.0")
    ]
    assert same[0] == same[1]
    assert flags(FrontierOptions, same[0]) == flags(FrontierOptions, same[1])
    assert "--budget-bits 3 " in flags(FrontierOptions, same[0])


def test_flags_take_what_a_step_has_and_refuse_what_no_step_has() -> None:
    runtime = sections.Runtime(threads=2, layers_per_job=3)
    text = flags(SolveOptions, runtime, r=0.75)
    assert text == "--r 0.75"
    assert (
        flags(CaptureOptions, runtime, gradient=False) == "--batch 8 --device auto --no-gradient --seed 0 --threads 2"
    )
    with pytest.raises(KeyError):
        flags(SolveOptions, rr=0.75)


@pytest.mark.parametrize(
    ("section", "step"),
    [
        (sections.Model, "trace"),
        (sections.Trace, "trace"),
        (sections.Calibrate, "capture"),
        (sections.Calibrate, "calibrate"),
        (sections.Solve, "frontier"),
        (sections.Solve, "check"),
        (sections.Solve, "report"),
        (sections.Extrapolate, "extrapolate"),
        (sections.Evaluate, "evaluate"),
        (sections.Evaluate, "tasks"),
        (sections.Runtime, "trace"),
        (sections.Runtime, "calibrate"),
    ],
)
def test_defaults_by_hand_are_those_of_the_workflow(section: type[Options], step: str) -> None:
    own = class_of(step).model_fields
    shared = section.model_fields.keys() & own.keys()
    assert shared
    for name in shared:
        field = section.model_fields[name]
        assert field.is_required() or field.default == own[name].default, name
        assert field.description == own[name].description, name


def test_a_grid_lists_the_default_of_the_step() -> None:
    assert sections.Sweep.model_fields["granularity"].default == [FrontierOptions.model_fields["granularity"].default]


def test_every_option_says_what_it_is() -> None:
    for kind in [class_of(step) for step in STEPS]:
        for name, field in kind.model_fields.items():
            assert field.description, (kind, name)
            option = option_of(field)
            assert option.kind is bool or option.flag.unit or option.kind is not Path, (kind, name)


@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [
        (SolveOptions, "--frontier f --out o", "give one of --r, --max-time-us and --max-loss"),
        (SolveOptions, "--frontier f --out o --r 1 --max-loss 2", "give one of --r, --max-time-us and --max-loss"),
        (SolveOptions, "--r 1 --out o", "the following arguments are required: --frontier"),
        (ProfileOptions, "--schemes w4a16 --out o", "give one of --hardware and --measurements"),
        (ProfileOptions, "--schemes w5 --hardware h100 --out o", "argument --schemes: scheme 'w5' is not of the form"),
        (EvaluateOptions, "--model m --out o", "give either --reference, or --sources with --texts"),
        (
            CaptureOptions,
            "--model m --out o --sources {} --text a --no-gradient --down-to 3",
            "--down-to is about gradients; leave it out with --no-gradient",
        ),
        (
            FrontierOptions,
            "--losses l --trace t --profile p --out o --tokens 1 --budget-bits 3 --loss sum_of_norms",
            "--loss sum_of_norms is the norm of out_sq; use it with --metric out_sq",
        ),
        (TraceOptions, "MODEL a --sources {}", "argument --texts: 'a' is listed twice"),
        (TraceOptions, "MODEL --sources '['", "argument --sources: not a JSON object"),
        (TraceOptions, "MODEL --sources ''", "argument --sources: not a JSON object"),
        (
            TraceOptions,
            "--model m --out o --texts a --sources '[]'",
            "argument --sources: Input should be a valid dict",
        ),
        (TraceOptions, "MODEL --sources 3", "argument --sources: Input should be a valid dict"),
        (
            TraceOptions,
            """MODEL --sources '{"a": 3}'""",
            "argument --sources: Input should be a valid dict",
        ),
        (
            TraceOptions,
            "--model m --out o --texts a --sources {} --until 0",
            "--until: '0' is not a whole number from 1",
        ),
        (
            TraceOptions,
            "--model m --out o --texts a --sources {} --dtype int8",
            "argument --dtype: invalid choice: 'int8'",
        ),
        (TraceOptions, "MODEL --sources {} --device gpu", "; found 'gpu'"),
        (CheckOptions, "--trace 1 --model m", "argument"),
    ],
)
def test_a_mistake_is_one_line(
    kind: type[Options], words: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert says in refusal(kind, words.replace("MODEL", "--model m --out o --texts a"), capsys)


def test_what_decides_bytes_is_told_from_what_does_not() -> None:
    one = TraceOptions(**TRACE)
    two = TraceOptions(**{**TRACE, "out": "elsewhere"}, borders="b", until=3, made_from="x")
    assert one.deciding() == two.deciding()
    assert one.deciding() != TraceOptions(**TRACE, seed=1).deciding()


def test_the_demo_spells_the_options_of_a_step() -> None:
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    text = flags(TraceOptions, sections.Trace(**config["trace"]), sections.Runtime(**config["runtime"]))
    assert text == (
        "--batch 8 --device cpu --length 512 --seed 0 --sequences 16 --texts english french spanish code mixed"
        " --threads 1"
    )


def test_help_is_instant(tmp_path: Path) -> None:
    """In seconds of a processor, whatever else runs: about 0.2; PyTorch alone takes three."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "mxmoe_steps.trace", "--help"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
