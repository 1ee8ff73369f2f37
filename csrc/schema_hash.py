"""Write schema_hash.h, the hash of the operator schemas of this source tree, and the files it was read from.

python csrc/schema_hash.py OUTPUT_HEADER DEPFILE
"""

import os
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
os.environ["SPECTRAL_OPS_NO_EXTENSION"] = "1"  # the extension being built is not there, or is an old one
os.environ.pop("SPECTRAL_OPS_BACKEND", None)

from spectral_ops import _library, functional  # noqa: E402, F401  (importing functional defines the operators)

header, depfile = sys.argv[1:]
text = f'#define SPECTRAL_OPS_SCHEMA_HASH "{_library.schema_hash()}"\n'
if not os.path.exists(header) or Path(header).read_text() != text:
    Path(header).write_text(text)  # left alone when unchanged, so that nothing is rebuilt
package = root / "spectral_ops"
files = [getattr(m, "__file__", None) for name, m in sys.modules.items() if name.split(".")[0] == "spectral_ops"]
sources = sorted(f for f in files if f and Path(f).is_relative_to(package))
Path(depfile).write_text(f"{header}: " + " ".join(f.replace(" ", "\\ ") for f in sources) + "\n")
