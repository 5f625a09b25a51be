"""Date, machine, versions and commit of a benchmark's results."""

import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch


def about() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "date": str(date.today()),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "commit": commit,
    }
