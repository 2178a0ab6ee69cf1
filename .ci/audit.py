"""Known vulnerabilities of the pinned packages: `make audit`. Exit code 1 when there is one.

pip-audit itself says "No known vulnerabilities found" of packages that its service did not know, such as behind
a mirror that serves packages only. Here what was not audited is said, and without a network that is one line.
The pins are audited, not the installed files: torch's local version (+cpu) is unknown to every service.
"""

import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).parent.parent / "constraints.txt"


def verdict(packages: list[dict]) -> tuple[list[str], int]:
    """Lines to print, and the exit code."""
    audited = [package for package in packages if "vulns" in package]
    lines = [
        f"{package['name']} {package['version']}: {vulnerability['id']},"
        f" mended in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        for package in audited
        for vulnerability in package["vulns"]
    ]
    code = int(bool(lines))
    count = f"{len(lines)} known vulnerabilities in {len(audited)} of {len(packages)} pinned packages"
    unknown = [package["name"] for package in packages if "vulns" not in package]
    if not audited:
        return ["not audited: the service answered for none of the pinned packages"], 0
    if unknown:
        lines.append(f"not audited: {', '.join(unknown)}")
    return [*lines, count], code


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(PINS), "--no-deps", "--disable-pip"]
    done = subprocess.run([*command, "--format", "json", "--progress-spinner", "off"], capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:  # it prints nothing where it failed
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"not audited: no answer from the service of known vulnerabilities ({reason[:200]})")
        return 0  # CI without a network is not a vulnerability
    lines, code = verdict(packages)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
