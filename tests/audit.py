"""Are there known vulnerabilities in what requirements.txt pins? `make audit`

pip-audit asks PyPI's vulnerability database, and OSV's where that does not answer. Exit status 1 if it knows of one, 0 if
it knows of none or neither can be reached, which is said: a machine without a network is no reason to fail. A database
that says of every package that it is not there (mirrors do) has not been reached either, though pip-audit passes.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SERVICES = ("pypi", "osv")
LIMIT = 300  # seconds
UNREACHED = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "ServiceError", "HTTPError", "SSLError")
AUDIT = [
    sys.executable,
    "-m",
    "pip_audit",
    "--require-hashes",
    "--disable-pip",
    "--progress-spinner",
    "off",
    "-f",
    "json",
]


@dataclass(frozen=True)
class Audit:
    """What a database says.

    Attributes:
        asked: packages that it knows.
        unknown: packages that it does not know.
        found: one line a vulnerability: package, version, its names, the versions that mend it.
    """

    asked: tuple[str, ...]
    unknown: tuple[str, ...]
    found: tuple[str, ...]


class Unreached(RuntimeError):
    """The database did not answer; the message says why."""


def audit(requirements: Path, service: str) -> Audit:
    """What pip-audit finds out with a service.

    Raises:
        Unreached: the service cannot be reached, or knows none of the packages.
        RuntimeError: pip-audit failed for another reason; its last lines are given.
    """
    command = [*AUDIT, "--vulnerability-service", service, "--requirement", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise Unreached(f"{service} has not answered within {LIMIT} s") from error
    try:
        return read_audit(done.stdout, service)
    except json.JSONDecodeError as error:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        if any(name in done.stderr for name in UNREACHED):
            raise Unreached(f"{service}: {last[0][:200]}") from error
        raise RuntimeError(f"pip-audit ended with {done.returncode}: {last[0]}") from error


def read_audit(text: str, service: str) -> Audit:
    """What pip-audit's JSON says.

    Raises:
        Unreached: every package was skipped.
    """
    asked, unknown, found = [], [], []
    for package in json.loads(text)["dependencies"]:
        if "skip_reason" in package:
            unknown.append(package["name"])
            continue
        asked.append(package["name"])
        for one in package["vulns"]:
            names, mended = ", ".join([one["id"], *one.get("aliases", ())]), ", ".join(one["fix_versions"])
            found.append(f"{package['name']} {package['version']}: {names}; mended in {mended or 'no version yet'}")
    if not asked:
        raise Unreached(f"{service} knows none of {len(unknown)} packages, as if a mirror had answered for it")
    return Audit(tuple(asked), tuple(unknown), tuple(found))


def main(requirements: Path = Path(__file__).parents[1] / "requirements.txt") -> int:
    reasons = []
    for service in SERVICES:
        try:
            result = audit(requirements, service)
        except Unreached as error:
            reasons.append(str(error))
            continue
        print(f"audit: {len(result.asked)} packages asked of {service}, {len(result.found)} known vulnerabilities")
        if result.unknown:
            print(f"audit: not known there: {', '.join(result.unknown)}")
        print(*result.found, sep="\n", end="\n" if result.found else "")
        return int(bool(result.found))
    print("audit: SKIPPED, no vulnerability database could be reached:", *reasons, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
