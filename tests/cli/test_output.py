"""The output contract: what each mode prints where, for the same facts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from _cli import Terminal

from tolkit_cli._errors import Failure
from tolkit_cli._output import Column, Mode, Output

ROWS = [{"name": "nf4", "kl": 0.012345}, {"name": "int8", "kl": None}]
COLUMNS = (
    Column("name", "tables", right=False),
    Column("kl", "KL", lambda value: f"{value:.3f}"),
)


def spoken(mode: Mode, quiet: bool = False, failure: Failure | None = None) -> tuple[str, str]:
    """stdout and stderr of one command that uses everything."""
    out = Output(
        command="probe", mode=mode, quiet=quiet, stdout=io.StringIO(), stderr=io.StringIO()
    )
    out.field("inputs", "bundle", Path("a.tol"))
    out.field("metrics", "bytes", 2048, "size", "2.05 kB")
    out.field("metrics", "ok_flag", True)
    out.text("for people")
    out.table("rows", COLUMNS, ROWS)
    out.warn("careful")
    out.warn("careful")
    out.hint("next")
    out.quiet_value(2048)
    if failure:
        out.fail(failure)
    else:
        out.finish()
    assert isinstance(out.stdout, io.StringIO)
    assert isinstance(out.stderr, io.StringIO)
    return out.stdout.getvalue(), out.stderr.getvalue()


def test_human_is_aligned_and_has_units() -> None:
    stdout, stderr = spoken("human")
    assert stdout.splitlines() == [
        "bundle                a.tol",
        "size                  2.05 kB",
        "ok flag               yes",
        "for people",
        "tables     KL",
        "nf4     0.012",
        "int8        -",
    ]
    assert stderr == "warning: careful\nhint: next\n"


def test_plain_is_tab_separated_raw_numbers() -> None:
    stdout, _ = spoken("plain")
    assert stdout.splitlines() == [
        "bundle\ta.tol",
        "bytes\t2048",
        "ok_flag\ttrue",
        "",
        "name\tkl",
        "nf4\t0.012345",
        "int8\t",
    ]


def test_json_is_one_object_with_the_promised_keys() -> None:
    stdout, _ = spoken("json")
    result = json.loads(stdout)
    assert list(result) == [
        "schema",
        "command",
        "ok",
        "inputs",
        "outputs",
        "metrics",
        "thresholds",
        "timings_s",
        "versions",
        "warnings",
    ]
    assert result["ok"] is True
    assert result["command"] == "probe"
    assert result["inputs"] == {"bundle": "a.tol"}
    assert result["metrics"] == {"bytes": 2048, "ok_flag": True, "rows": ROWS}
    assert result["warnings"] == ["careful"]
    assert result["timings_s"]["total"] >= 0


@pytest.mark.parametrize("mode", ["human", "plain"])
def test_quiet_prints_one_value_and_keeps_warnings(mode: Mode) -> None:
    assert spoken(mode, quiet=True) == ("2048\n", "warning: careful\n")


@pytest.mark.parametrize("mode", ["human", "plain", "json"])
def test_a_failure_is_two_lines_on_stderr(mode: Mode) -> None:
    failure = Failure(4, "BundleError", "a.tol: damaged", "tol verify a.tol")
    stdout, stderr = spoken(mode, failure=failure)
    assert stderr.splitlines()[-2:] == ["error: a.tol: damaged", "hint: tol verify a.tol"]
    if mode != "json":
        assert "damaged" not in stdout
        return
    result = json.loads(stdout)
    assert result["ok"] is False
    assert result["error"] == {
        "type": "BundleError",
        "message": "a.tol: damaged",
        "hint": "tol verify a.tol",
    }


def test_numbers_that_are_not_finite_become_null_with_a_warning() -> None:
    out = Output(command="probe", mode="json", stdout=io.StringIO(), stderr=io.StringIO())
    out.record("metrics", ppl=float("nan"), list=[1.0, float("inf")], scalar=np.float32(2.5))
    out.finish()
    assert isinstance(out.stdout, io.StringIO)
    result = json.loads(out.stdout.getvalue())
    assert result["metrics"] == {"ppl": None, "list": [1.0, None], "scalar": 2.5}
    assert [line.split(":")[0] for line in result["warnings"]] == ["metrics.ppl", "metrics.list[1]"]


def test_plain_values_never_break_their_line() -> None:
    out = Output(command="probe", mode="plain", stdout=io.StringIO(), stderr=io.StringIO())
    out.field("inputs", "path", "a\tb\nc")
    assert isinstance(out.stdout, io.StringIO)
    assert out.stdout.getvalue() == "path\ta b c\n"


def test_human_on_a_terminal_plain_elsewhere() -> None:
    assert Output(stdout=Terminal()).mode == "human"
    assert Output(stdout=io.StringIO()).mode == "plain"


def test_a_wide_table_goes_on_below_with_its_leading_columns_again() -> None:
    columns = [Column("id", "id", right=False), *(Column(f"c{i}", f"c{i}") for i in range(5))]
    row = {"id": "x", **{f"c{i}": str(i) * 30 for i in range(5)}}
    out = Output(mode="human", stdout=io.StringIO(), stderr=io.StringIO())
    out.table("rows", columns, [row], leading=1)
    assert isinstance(out.stdout, io.StringIO)
    lines = out.stdout.getvalue().splitlines()
    assert [line.split() for line in lines] == [
        ["id", "c0", "c1"],
        ["x", "0" * 30, "1" * 30],
        [],
        ["id", "c2", "c3"],
        ["x", "2" * 30, "3" * 30],
        [],
        ["id", "c4"],
        ["x", "4" * 30],
    ]
    assert max(map(len, lines)) <= 80
    whole = Output(mode="human", stdout=io.StringIO(), stderr=io.StringIO())
    whole.table("rows", columns, [row])
    assert isinstance(whole.stdout, io.StringIO)
    assert len(whole.stdout.getvalue().splitlines()) == 2
