"""A user's own quantizer, loss and text source: run by the workflow and by hand, stamped, refused in words."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from workflow import ROOT, SETTINGS, environment, planned, snakemake, write_settings

from mxmoe_steps import calibrate, provenance
from mxmoe_steps.calibration import loss
from mxmoe_steps.calibration.inputs import Batch
from mxmoe_steps.config.loading import load_config
from mxmoe_steps.data.parsing import parse_source
from mxmoe_steps.data.sources import SOURCES, documents
from mxmoe_steps.errors import UserError
from mxmoe_steps.quantizers.hessians import Hessians
from mxmoe_steps.quantizers.method import QUANTIZERS
from mxmoe_steps.schemes import parse_scheme
from mxmoe_steps.tables import LOSSES, read_table

QUANTIZER = '''
"""Rounding under another name, in two steps."""
from my_helpers import rounded
from mxmoe_steps.quantizers.quantizer import QUANTIZERS, Quantizer

@QUANTIZERS.register("mine")
class Mine(Quantizer):
    def quantize(self, weight, scheme, hessians):
        return rounded(weight, scheme)
'''
HELPER = """
def rounded(weight, scheme):
    from mxmoe_steps.quantizers.grid import round_to_nearest
    return round_to_nearest(weight, scheme)
"""
LOSS = """
from mxmoe_steps.calibration.loss import LOSSES, Loss

@LOSSES.register("twice")
class Twice(Loss):
    def of(self, change, batch):
        return 2 * (change.double() * batch.scale.unsqueeze(-1).double()).square().sum()
"""
TEXT = """
from dataclasses import dataclass
from pathlib import Path
from mxmoe_steps.data.sources import SOURCES, TextSource, split_of

@SOURCES.register("pages")
@dataclass(frozen=True)
class Pages(TextSource):
    pages: str
    most: int = 300
    remedy = "write more"

    def local_files(self):
        return [self.pages]

    def documents(self, split):
        found = Path(self.pages).read_text(encoding="utf-8").split("\\n-----\\n")[: self.most]
        return [text for text in found if split_of(text, (500, 500)) == split]
"""
MODULES = {"my_quantizers": QUANTIZER, "my_helpers": HELPER, "my_losses": LOSS, "my_texts": TEXT}
EXTENSIONS: dict[str, Any] = {
    "extensions": ["own/my_quantizers.py", "own/my_losses.py", "own/my_texts.py"],
    "texts": {**SETTINGS["texts"], "mine": {"pages": "words.txt"}},
    "calibrate": SETTINGS["calibrate"] | {"quantizers": ["rtn", "mine"], "text": "mine"},
    "solve": {"traffic": "words", "metric": "twice"},
    "sweep": [{"budget_bits": [4.5], "tokens": [64], "quantizer": "mine"}],
}
AFTER_FRONTIER = {"solve": 1, "quantize": 1, "evaluate": 1, "report": 1}
BOTH = {"calibrate": 6, "frontier": 2, "solve": 2, "quantize": 2, "evaluate": 2, "report": 1}


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that ran to the end, then again with modules of its own."""
    folder = tmp_path_factory.mktemp("extensions") / "project"
    shutil.copytree(finished, folder)
    (folder / "own").mkdir()
    for name, text in MODULES.items():
        (folder / "own" / f"{name}.py").write_text(text, encoding="utf-8")
    write_settings(folder, SETTINGS | EXTENSIONS)
    snakemake(folder)
    return folder


def test_own_classes_compute_what_they_say(project: Path) -> None:
    """The quantizer is rounding, the loss twice another one, and the text that of a source of ours."""
    results = project / "results" / "tiny" / "calibrate"
    for scheme in ("w2a16_g32_asym", "w4a16_g32_asym", "w8a8_g-1_sym_fp8"):
        mine, rounded = (load_file(results / name / f"{scheme}.safetensors") for name in ("mine", "rtn"))
        assert mine.keys() == rounded.keys()
        assert all((mine[key].view(-1) == rounded[key].view(-1)).all() for key in mine)
        table, facts = read_table(LOSSES, results / "mine" / f"{scheme}.parquet")
        assert facts["quantizer"] == "mine"
        rows = table.to_pandas()
        assert list(rows.columns)[-3:] == ["out_sq.mine", "twice", "twice.mine"]
        assert rows["twice"].to_numpy() == pytest.approx(2 * rows["out_sq"].to_numpy(), rel=1e-6)
    text = yaml.safe_load((project / "config" / "config.yaml").read_text(encoding="utf-8"))
    assert text["calibrate"]["text"] == "mine"


def test_steps_by_hand_take_the_same_modules(project: Path, tmp_path: Path) -> None:
    capture = project / "results" / "tiny" / "capture" / "mine"
    words = f"--model model --capture {capture} --quantizer mine --scheme w4a16_g32 --more-losses twice --device cpu"
    command = [sys.executable, "-m", "mxmoe_steps.calibrate", *shlex.split(words), "--out", str(tmp_path / "out")]
    files = ["--extensions", "own/my_quantizers.py", "own/my_losses.py"]
    subprocess.run([*command, *files], cwd=project, env=environment(project), check=True, capture_output=True)
    for kind in ("parquet", "safetensors"):
        name = f"w4a16_g32_asym.{kind}"
        theirs = project / "results" / "tiny" / "calibrate" / "mine" / name
        assert (tmp_path / "out" / name).read_bytes() == theirs.read_bytes()
    done = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: quantizer 'mine': known are rtn, gptq; the module of another one")

    source = '{"mine": {"pages": "words.txt"}}'
    words = f"--model model --dtype float32 --text mine --sequences 8 --length 64 --device cpu --sources '{source}'"
    command = [sys.executable, "-m", "mxmoe_steps.capture", *shlex.split(words), "--out", str(tmp_path / "capture")]
    files = ["--extensions", "own/my_texts.py"]
    subprocess.run([*command, *files], cwd=project, env=environment(project), check=True, capture_output=True)
    for file in sorted(capture.glob("*.safetensors")):
        assert (tmp_path / "capture" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("module", "jobs"),
    [
        ("my_quantizers", {"calibrate": 3, "frontier": 1, **AFTER_FRONTIER}),
        ("my_helpers", {"calibrate": 3, "frontier": 1, **AFTER_FRONTIER}),
        ("my_losses", BOTH),
        ("my_texts", {"capture": 1, **BOTH}),
    ],
)
def test_an_edit_runs_exactly_the_steps_that_use_it(project: Path, module: str, jobs: dict[str, int]) -> None:
    file = project / "own" / f"{module}.py"
    text = file.read_text(encoding="utf-8")
    try:
        file.write_text(text + "\n# a comment\n", encoding="utf-8")
        assert planned(project) == {}
        file.write_text(text + "\nCHANGED = True\n", encoding="utf-8")
        assert planned(project) == jobs
        assert f"{module}@" in snakemake(project, "--dry-run")
    finally:
        file.write_text(text, encoding="utf-8")


def test_a_module_that_nothing_uses_runs_nothing(project: Path) -> None:
    (project / "own" / "my_spare.py").write_text("SPARE = 1\n", encoding="utf-8")
    write_settings(project, SETTINGS | EXTENSIONS | {"extensions": [*EXTENSIONS["extensions"], "own/my_spare.py"]})
    try:
        assert planned(project) == {}
    finally:
        write_settings(project, SETTINGS | EXTENSIONS)


def test_the_examples_of_the_guide_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in turn, with names that are removed again."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for name, registry in (("weighted", QUANTIZERS), ("fourth", loss.LOSSES), ("paragraphs", SOURCES)):
        registry.pop(name, None)
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(code, {"__name__": "guide"})
    weight, moments = torch.randn(2, 8, 64), torch.randn(2, 64, 64, dtype=torch.float64)
    hessians = Hessians(moments @ moments.mT, torch.tensor([70, 0]), torch.eye(64, dtype=torch.float64), 0.01)
    scheme = parse_scheme("w4a16_g32")
    got = QUANTIZERS.pop("weighted")().quantize(weight, scheme, hessians)
    assert (got.dequantize() - weight).abs().max() < 0.5
    change, scale = torch.randn(5, 3), torch.rand(5)
    expected = (change.double() * scale.double()[:, None]).pow(4).sum()
    batch = Batch(change, scale, None)
    assert torch.isclose(loss.LOSSES.pop("fourth")().of(change, batch), expected, rtol=1e-6)
    (tmp_path / "notes.txt").write_text("\n\n".join(f"{number} " * 60 for number in range(50)), encoding="utf-8")
    source = parse_source("mine", {"paragraphs": str(tmp_path / "notes.txt"), "least": 120})
    SOURCES.pop("paragraphs")
    found = [documents(source, split) for split in ("calibration", "test")]
    assert min(map(len, found)) > 10
    assert not set(map(str, found[0])) & set(map(str, found[1]))
    assert all(len(str(text)) >= 120 for text in found[0])


REGISTER = """
from mxmoe_steps.quantizers.quantizer import QUANTIZERS, Quantizer
QUANTIZERS.register({!r})(type("Own", (Quantizer,), dict(__module__=__name__)))
"""


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("nowhere_1.py", None, "extensions: nowhere_1.py: no such file; correct the path"),
        ("broken_2.py", "import no_such_package", r"broken_2.py: cannot be imported \(ModuleNotFoundError: No module"),
        ("broken_3.py", "def f(:", r"broken_3.py: cannot be imported \(SyntaxError"),
        ("broken_4.py", "1 / 0", r"broken_4.py: cannot be imported \(ZeroDivisionError"),
        ("clash_5.py", REGISTER.format("gptq"), r"clash_5.py: quantizer 'gptq' of clash_5 is taken by .*builtin.Gptq"),
        ("clash_6.py", REGISTER.format("My one"), "clash_6.py: quantizer 'My one': a name is of small letters"),
        ("json.py", "X = 1", "json.py: json is the name of another module; rename the file"),
        ("my-file.py", "X = 1", "my-file.py: is not named like a Python module; rename it"),
        ("my_file.txt", "X = 1", "my_file.txt: is not named like a Python module; rename it"),
    ],
)
def test_a_module_that_cannot_serve_is_one_clear_error(
    tiny_moe: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str | None,
    says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(provenance, "_FOLDERS", [])
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / file).write_text(text, encoding="utf-8")
    words = {"files": [str(text_file)], "separator": "-----"}
    model = SETTINGS["model"] | {"path": str(tiny_moe)}
    settings = SETTINGS | {"model": model, "texts": {"words": words}, "extensions": [file]}
    with pytest.raises(UserError, match=says) as error:
        load_config(settings, "my.yaml")
    assert str(error.value).startswith("my.yaml is not a valid configuration:\n  extensions: ")
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"calibrate": SETTINGS["calibrate"] | {"quantizers": ["gptw"]}},
            "'gptw' is not a quantizer; did you mean",
        ),
        ({"solve": {"traffic": "words", "metric": "fischer"}}, "'fischer' is not a loss; did you mean 'fisher'"),
        ({"texts": {"words": {"pagez": "words.txt"}}}, "needs exactly one of the keys package, files, hub, mix"),
    ],
)
def test_names_that_nobody_registered(tiny_moe: Path, text_file: Path, change: dict[str, Any], says: str) -> None:
    words = {"files": [str(text_file)], "separator": "-----"}
    model = SETTINGS["model"] | {"path": str(tiny_moe)}
    with pytest.raises(UserError, match=says):
        load_config(SETTINGS | {"model": model, "texts": {"words": words}} | change, "my.yaml")


def test_a_loss_is_no_other_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.LOSSES, "tokens", loss.Fisher)
    options = calibrate.CalibrateOptions(
        model="m", capture=[tmp_path], quantizer="rtn", scheme="w4a16", more_losses=["tokens"], out=tmp_path / "out"
    )
    with pytest.raises(UserError, match="loss 'tokens': another column has that name"):
        calibrate.calibrate(options)
