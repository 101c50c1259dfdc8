"""What the lessons in docs/lessons/ run: the program in parts, words for a terminal, checks, and bugs to plant."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEY = "demo-key"


def setting(name: str, default: object) -> str:
    """A variable of the environment, where it is set."""
    return os.environ.get(name) or str(default)


def data() -> Path:
    """The folder of the program's data; `lessons` in it is ours."""
    folder = Path(setting("DATA_DIR", "data"))
    (folder / "lessons").mkdir(parents=True, exist_ok=True)
    return folder


def url() -> str:
    """Where the API is."""
    return f"http://127.0.0.1:{setting('PORT', 8080)}"
