"""The audit of the pinned packages fails for what is known, and says where it could not ask."""

import json
import subprocess
import sys
from pathlib import Path

import audit
import pytest

KNOWN = {"name": "pillow", "version": "9.0.0", "vulns": []}
BAD = {"name": "jinja2", "version": "2.0", "vulns": [
    {"id": "PYSEC-2019-217", "aliases": ["CVE-2019-10906"], "fix_versions": ["2.10.1"], "description": "…"},
    {"id": "X-1", "fix_versions": []}]}  # fmt: skip
ABSENT = {"name": "own", "skip_reason": "Dependency not found on PyPI and could not be audited: own (1)"}


def answering(monkeypatch, *answers):
    """pip-audit gives these, one after the other: (stdout, stderr, status) or an exception."""
    waiting = list(answers)

    def run(command, **_):
        answer = waiting.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, answer[2], answer[0], answer[1])

    monkeypatch.setattr(subprocess, "run", run)


def told(*packages):
    return json.dumps({"dependencies": packages, "fixes": []}), "", int(BAD in packages)


def test_a_known_vulnerability_fails_and_is_named_with_its_cure(monkeypatch, capsys):
    answering(monkeypatch, told(KNOWN, BAD, ABSENT))
    assert audit.main() == 1
    assert capsys.readouterr().out == (
        "audit: 2 packages asked of pypi, 2 known vulnerabilities\naudit: not known there: own\n"
        "jinja2 2.0: PYSEC-2019-217, CVE-2019-10906; mended in 2.10.1\njinja2 2.0: X-1; mended in no version yet\n"
    )


def test_none_passes(monkeypatch, capsys):
    answering(monkeypatch, told(KNOWN))
    assert audit.main() == 0
    assert capsys.readouterr().out == "audit: 1 packages asked of pypi, 0 known vulnerabilities\n"


def test_what_cannot_be_asked_is_skipped_and_says_so(monkeypatch, capsys):
    lost = ("", "Traceback …\nrequests.exceptions.ConnectionError: no route", 1)
    answering(monkeypatch, lost, subprocess.TimeoutExpired("pip-audit", 300))
    assert audit.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("audit: SKIPPED, no vulnerability database could be reached:\n  pypi: requests.exceptions")
    assert "osv has not answered within 300 s" in said


def test_the_second_database_is_asked_where_the_first_knows_nothing(monkeypatch, capsys):
    answering(monkeypatch, told(ABSENT, ABSENT), told(BAD))
    assert audit.main() == 1
    assert "1 packages asked of osv" in capsys.readouterr().out


def test_another_failure_is_none_of_the_network_and_is_no_pass(monkeypatch):
    answering(monkeypatch, ("", "ERROR:pip_audit._cli:requirement x is not hashed", 1))
    with pytest.raises(RuntimeError, match=r"pip-audit ended with 1: .* is not hashed"):
        audit.main()


def test_pip_audit_takes_our_arguments_and_reads_our_requirements(tmp_path):
    """For real, on a file that needs no network: it holds nothing."""
    pytest.importorskip("pip_audit")
    (tmp_path / "requirements.txt").write_text("")
    done = subprocess.run(
        [*audit.AUDIT, "--requirement", tmp_path / "requirements.txt"], capture_output=True, text=True
    )
    assert json.loads(done.stdout)["dependencies"] == [] and done.returncode == 0, done.stderr
    assert sys.executable == audit.AUDIT[0] and Path(audit.__file__).name == "audit.py"
