"""The package's version and the commit that it was built from, where every layer may import them."""

import json
from pathlib import Path

RELEASE = "0.1.0"  # setup.py reads it here


def _head(git: Path) -> str | None:
    """The commit that a checkout is at, as git's own files say it: asking git would take longer than this import."""
    try:
        if git.is_file():  # a worktree: "gitdir: <folder>"
            git = git.parent / git.read_text().partition(":")[2].strip()
        head = (git / "HEAD").read_text().strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        shared = git / "commondir"
        common = git / shared.read_text().strip() if shared.exists() else git
        if (common / name).exists():
            return (common / name).read_text().strip()
        packed = (line.split() for line in (common / "packed-refs").read_text().splitlines())
        return next((words[0] for words in packed if words[1:] == [name]), None)
    except (OSError, UnicodeDecodeError):
        return None


_built = Path(__file__).with_name("_built.json")  # a wheel has it
if _built.exists():
    _told = json.loads(_built.read_text())
    __version__, __commit__ = _told["version"], _told["commit"]
else:
    __commit__ = _head(Path(__file__).resolve().parents[1] / ".git")
    __version__ = f"{RELEASE}.dev0" + (f"+g{__commit__[:7]}" if __commit__ else "")
