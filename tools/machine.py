"""What a page of measurements says of the machine."""

import platform
from pathlib import Path


def processor_name() -> str:
    """As Linux knows the processor; elsewhere its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
