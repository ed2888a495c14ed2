"""`tol history`: what it prints, draws and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from _eval_results import METRICS, made
from _nano import MIXED, write_nano

from tolkit.evaluate import Metric, append_quality, quality_record
from tolkit.progress import SilentProgress
from tolkit_cli.main import main
from tolkit_formats import open_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "b.tol"
    write_nano(path, MIXED)
    result = made(identity=open_bundle(path).identity)
    append_quality(path, quality_record(result), SilentProgress())
    return path


def test_json_has_every_step_and_error(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", str(bundle), "--json"]) == 0
    (step,) = json.loads(capsys.readouterr().out)["metrics"]["steps"]
    assert step["identity"] == open_bundle(bundle).identity
    assert step["path"] == str(bundle)
    for name in ("ppl_token", "ppl_increase", "kl_mean_nats", "top1_agreement"):
        assert step[name] == METRICS[name].value
        assert step[f"{name}_se"] == METRICS[name].se


def test_for_people_an_error_stands_behind_its_value(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["history", str(bundle), "--format", "human"]) == 0
    text = capsys.readouterr().out
    assert "103.50 +-3.60  +0.40 +-0.05" in text
    assert "97.00 +-0.20" in text
    assert max(map(len, text.splitlines())) <= 80
    assert f"reference             {'d' * 12}, ppl 103.1000" in text
    assert "_se" not in text


def test_an_unknown_error_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.tol"
    write_nano(path, MIXED)
    metrics = {"ppl_token": Metric(12.0, float("nan"), 9)}
    result = made(identity=open_bundle(path).identity, metrics=metrics)
    append_quality(path, quality_record(result), SilentProgress())
    assert main(["history", str(path), "--format", "human"]) == 0
    assert "  12.00  " in capsys.readouterr().out


def test_without_records_the_steps_are_still_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "b.tol"
    write_nano(path, MIXED)
    for form in ("human", "plain", "json"):
        assert main(["history", str(path), "--format", form]) == 0
        assert "build" in capsys.readouterr().out


def test_quiet_gives_the_last_perplexity(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", str(bundle), "-q"]) == 0
    assert capsys.readouterr().out == "103.5\n"


@pytest.mark.parametrize("name", ["h.png", "h.svg"])
def test_the_picture_is_written_once(bundle: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib", reason="the plots extra is not installed")
    picture = tmp_path / name
    command = ["history", str(bundle), "--plot", str(picture)]
    assert main(command) == 0
    first = picture.read_bytes()
    assert main(command) == 2, "an existing picture is kept"
    assert main([*command, "--force"]) == 0
    assert picture.read_bytes() == first


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--plot", "h.jpg"], "--plot: h.jpg: expected a name ending in .png or .svg", 2),
        (["--plot", "nowhere/h.png"], "--plot: nowhere: no such folder", 2),
        (["--text", "ffff"], "--text: no record is of a text with digest ffff..", 2),
        (["--search", "nowhere"], "--search: nowhere: no such folder", 4),
    ],
)
def test_what_it_refuses(
    bundle: Path, options: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["history", str(bundle), *options]) == code
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_picture_without_matplotlib_is_6(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["history", str(bundle), "--plot", "x.png"]) == 6
    assert "hint: pip install 'tolkit[plots]'" in capsys.readouterr().err


def test_it_needs_no_torch(bundle: Path) -> None:
    code = (
        "import sys; from tolkit_cli.main import main; "
        f"code = main(['history', {str(bundle)!r}]); sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr
