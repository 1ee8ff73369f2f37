"""Write schema_hash.h, the hash of the operator schemas of this source tree, and the files it was read from.

Usage: python csrc/schema_hash.py OUTPUT_HEADER DEPFILE
"""

import importlib
import os
import sys
import types
from pathlib import Path

header, depfile = sys.argv[1:]
package = Path(__file__).resolve().parent.parent / "spectral_ops"
# A bare package around the operators' files: its __init__ would load the extension that is being built, or an old one.
sys.modules["spectral_ops"] = bare = types.ModuleType("spectral_ops")
bare.__path__ = [str(package)]
importlib.import_module("spectral_ops.functional")  # defines every operator
schema_hash = importlib.import_module("spectral_ops._library").schema_hash()

text = f'#define SPECTRAL_OPS_SCHEMA_HASH "{schema_hash}"\n'
if not os.path.exists(header) or Path(header).read_text() != text:
    Path(header).write_text(text)  # left alone when unchanged, so that nothing is rebuilt
files = [getattr(m, "__file__", None) for name, m in sys.modules.items() if name.startswith("spectral_ops.")]
Path(depfile).write_text(f"{header}: " + " ".join(f.replace(" ", "\\ ") for f in sorted(filter(None, files))) + "\n")
