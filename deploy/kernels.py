"""Lays out a kernel repository for Hugging Face's ``kernels`` from the package: ``python -m deploy.kernels FOLDER``.

The Hub's loader imports a folder under a name of its own, beside whatever is installed. So imports become relative, and
the operators get a namespace of their own. Nothing else changes, so there is no second code tree. The folder holds the
references and the Triton kernels; the compiled extensions, the benchmark and the command line stay in the wheel.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "spectral_ops"
BACKENDS = ("cpu", "cuda")  # a variant for each: the same files
LEFT_OUT = ("bench", "cli", "__main__.py", "__pycache__", "*.so")
NAMED = {  # what names the package otherwise than by an import
    "__init__.py": ('find_spec("spectral_ops.triton_kernels")', 'find_spec(f"{__name__}.triton_kernels")'),
    "_library.py": ('NAMESPACE = "spectral_ops"', 'NAMESPACE = "NEW_NAME"'),
    "_loader.py": ('Extension("spectral_ops.', 'Extension(f"{__package__}.'),
}


def relative(text: str, depth: int) -> str:
    """``text`` of a module ``depth`` folders below the package, with relative imports of it."""
    dots = "." * (depth + 1)
    text = re.sub(r"^(\s*from )spectral_ops( import)", rf"\1{dots}\2", text, flags=re.MULTILINE)
    return re.sub(r"^(\s*from )spectral_ops\.", rf"\1{dots}", text, flags=re.MULTILINE)


def check(path: Path, text: str) -> None:
    """Raises ValueError where a module would still import the installed package."""
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            if name.partition(".")[0] == "spectral_ops":
                raise ValueError(f"{path}: line {node.lineno}: imports {name}, wanted `from {name} import ...`")


def lay_out(folder: Path) -> str:
    """Write ``folder`` whole or not at all; returns the operators' namespace, which is that of this content.

    Raises FileExistsError where the folder exists, and ValueError where the package is not as this expects.
    """
    if folder.exists():
        raise FileExistsError(f"{folder}: exists, wanted a new folder")
    modules, other = {}, {}
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        part = Path(temporary)
        shutil.copytree(PACKAGE, part / "package", ignore=shutil.ignore_patterns(*LEFT_OUT))
        for path in sorted((part / "package").rglob("*.*")):
            place = path.relative_to(part / "package")
            if path.suffix != ".py":
                other[place] = path.read_bytes()
                continue
            text = relative(path.read_text(), len(place.parts) - 1)
            old, new = NAMED.get(str(place), ("", ""))
            if old not in text:
                raise ValueError(f"{place}: has no {old}, which deploy/kernels.py replaces")
            modules[place] = text.replace(old, new) if old else text
            check(place, modules[place])
        content = hashlib.sha256(repr((modules, other)).encode()).hexdigest()
        namespace = f"_spectral_ops_{content[:12]}"
        for backend in BACKENDS:
            variant = part / "repository/build" / f"torch-{backend}"
            for place, text in modules.items():
                (variant / place).parent.mkdir(parents=True, exist_ok=True)
                (variant / place).write_text(text.replace("NEW_NAME", namespace))
            for place, data in other.items():
                (variant / place).write_bytes(data)
            metadata = {"id": f"{namespace}_{backend}", "name": "spectral-ops", "version": 1, "license": "Apache-2.0"}
            metadata |= {"python-depends": [], "backend": {"type": backend}}
            (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        shutil.copyfile(ROOT / "LICENSE", part / "repository/LICENSE")
        os.replace(part / "repository", folder)
    return namespace


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder")
    folder = parser.parse_args(arguments).folder.resolve()
    try:
        namespace = lay_out(folder)
    except (OSError, ValueError) as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: a kernel repository; its operators are in torch.ops.{namespace}")
    print(f"try it: kernels.get_local_kernel(Path({str(folder)!r}))")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
